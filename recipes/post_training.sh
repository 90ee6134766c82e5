#!/usr/bin/env bash
# The mini model through all of post-training, on a CPU: quality tuning, preferences and DPO, image-to-text, instruction tuning, a report.
#
#   recipes/post_training.sh [--smoke] [--work FOLDER] [--model FOLDER] [--samples FOLDER]
#
#   --work      where everything goes (default: runs/post_training, or runs/post_training_smoke); the result is WORK/report.html
#   --model     the model to begin with, a folder or "mini" (default), the one that is part of the package
#   --samples   folder with images.parquet, as recipes/mini/select_core.py writes it (default: .cache/mini_core)
#   --smoke     the same steps in two or three minutes: it shows that everything is in place, the numbers mean nothing
#
# The model that ships has learnt every picture at one size, by heart; no voter could prefer another. So its pre-training goes on first, with
# the same pictures at several sizes.
# Voters are scripts that like large subjects and vote through the voting server's HTTP interface into its database. Scores to select by are
# measures of pixels, since HPSv2.1, MPS and the LAION aesthetic head cannot be had here; see docs/post_training.md.
# Stop it whenever you like and start it again: what is complete is skipped, and a training goes on from its last checkpoint.
# Needs: pip install -e '.[preferences]'

set -euo pipefail
caller=$PWD
cd "$(dirname "$0")/.."

smoke=false work= model=mini samples=.cache/mini_core
while (($#)); do
    case $1 in
    --smoke) smoke=true ;;
    --work | --model | --samples)
        if (($# < 2)); then
            echo "post_training.sh: $1 needs a folder" >&2
            exit 2
        fi
        if [[ $2 == /* || $2 == mini ]]; then folder=$2; else folder=$caller/$2; fi
        printf -v "${1#--}" %s "$folder"
        shift
        ;;
    --help | -h)
        sed -n '2,/^$/s/^# \{0,1\}//p' "recipes/$(basename "$0")"
        exit 0
        ;;
    *)
        echo "post_training.sh: $1 is unknown; allowed are --smoke, --work FOLDER, --model FOLDER and --samples FOLDER" >&2
        exit 2
        ;;
    esac
    shift
done
if $smoke; then work=${work:-runs/post_training_smoke}; else work=${work:-runs/post_training}; fi
mkdir -p "$work"
work=$(cd "$work" && pwd)

# The repository's own environment if there is one, else whatever is on the path.
if [[ -x .venv/bin/emu3 ]]; then PATH=$PWD/.venv/bin:$PATH; fi
command -v emu3 >/dev/null || {
    echo "post_training.sh: the command emu3 is missing; run: pip install -e '.[preferences]'" >&2
    exit 2
}
images=$samples/images.parquet
[[ -e $images ]] || {
    echo "post_training.sh: $images is missing; recipes/mini_cpu.sh makes it, or name another folder with --samples" >&2
    exit 2
}
parts=recipes/post_training

# Full size, and what is small in a smoke test.
scored=() sizes=() pretraining=(--num-steps 2800) prompts=(--num-prompts 640 --num-tuning 96 --num-heldout 160) candidates=8
qft=(--num-steps 50) dpo=(--num-steps 60) image_to_text=(--num-steps 100) instruct=(--num-steps 600)
questions=() report=()
rows=(--rows-per-batch 4 --rows-per-micro-batch 4 --context-length 512)
pairs_per_batch=16
if $smoke; then
    scored=(--max-samples 60)
    sizes=(--sizes 1 0.7)
    pretraining=(--num-steps 2 --tokens-per-batch 1024 --max-validation 4)
    prompts=(--num-prompts 6 --num-tuning 4 --num-heldout 4)
    candidates=2
    qft=(--num-steps 2) dpo=(--num-steps 2) image_to_text=(--num-steps 2) instruct=(--num-steps 2)
    questions=(--max-pictures 4)
    report=(--max-prompts 3 --max-questions 6 --num-seeds 1 --num-candidates 4 --classifier-steps 2)
    rows=(--rows-per-batch 1 --rows-per-micro-batch 1 --context-length 256)
    pairs_per_batch=1
fi

step() { printf '\n== %s\n' "$*" >&2; }
done_already() { echo "   is there already: $*" >&2; }

step "1/10 scores of the pictures, and the best of them"
if [[ -e $work/best.parquet ]]; then
    done_already "$work/best.parquet"
else
    python $parts/score_samples.py --samples "$images" --output "$work/scored.parquet" ${scored[@]+"${scored[@]}"}
    emu3 select "$work/scored.parquet" --output "$work/best.parquet" --scores contrast colourfulness sharpness \
        --image-share 0.4 --image-min-pixels 4096
fi

# A smoke test goes on with these few pictures.
if $smoke; then images=$work/scored.parquet; fi

# The model's own folder also holds its tokenizers.
tokenizers=$model
if [[ $model == mini ]]; then tokenizers=src/openemu3/assets/mini; fi

step "2/10 pre-training goes on: pictures at several sizes"
vary_sizes() { # FROM TO
    if [[ ! -e $2 ]]; then python recipes/mini/vary_sizes.py "$1" "$2" ${sizes[@]+"${sizes[@]}"}; fi
}
vary_sizes "$images" "$work/sizes.parquet"
# Films are shown now and then, if there are any, so that they are not forgotten.
films=() rates=(draw 1 describe 0.3)
if ! $smoke && [[ -e $samples/videos.parquet ]]; then
    films=("$samples/videos.parquet")
    rates+=(film 0.5 describe_video 0.05)
fi
if [[ ! -e $work/documents/manifest.json ]]; then
    emu3 tokenize "$work/sizes.parquet" ${films[@]+"${films[@]}"} --tokenizers "$tokenizers" --output "$work/documents"
fi
if [[ -e $work/base_model/config.json ]]; then
    done_already "$work/base_model"
else
    emu3 train language "$work/documents" --tokenizers "$tokenizers" --init-from "$tokenizers" --output "$work/base" --learning-rate 6e-4 \
        --mixture "${rates[@]}" "${pretraining[@]}"
    emu3 export model "$work/base" --tokenizers "$tokenizers" --output "$work/base_model"
fi
base=$work/base_model

step "3/10 quality tuning: codes alone, linearly to zero"
vary_sizes "$work/best.parquet" "$work/best_sizes.parquet"
if [[ ! -e $work/best_documents/manifest.json ]]; then
    emu3 tokenize "$work/best_sizes.parquet" --tokenizers "$tokenizers" --output "$work/best_documents" --understanding-share 0
fi
if [[ -e $work/qft_model/config.json ]]; then
    done_already "$work/qft_model"
else
    emu3 train qft "$work/best_documents" --model "$base" --output "$work/qft" --learning-rate 5e-5 --validation-split heldout_combination \
        "${rows[@]}" "${qft[@]}"
    emu3 export model "$work/qft" --tokenizers "$tokenizers" --output "$work/qft_model"
fi

step "4/10 candidates of each prompt, with their tokens"
mkdir -p "$work/preferences"
if [[ ! -e $work/preferences/heldout.jsonl ]]; then
    python $parts/choose_prompts.py --samples "$images" --output "$work/preferences" "${prompts[@]}"
fi
database=$work/preferences/votes.sqlite
emu3 preferences sample "$work/preferences/prompts.txt" --database "$database" --model "$work/qft_model" --num-candidates $candidates \
    --temperature 1

step "5/10 votes, through the server"
if [[ -e $work/preferences/pairs.parquet ]]; then
    done_already "$work/preferences/pairs.parquet"
else
    emu3 preferences serve --database "$database" --port 0 2>"$work/preferences/server.log" &
    server=$!
    trap 'kill $server 2>/dev/null || true' EXIT
    address=
    for _ in $(seq 600); do
        address=$(sed -n 's/^voting at \(http[^ ]*\) .*/\1/p' "$work/preferences/server.log")
        if [[ -n $address ]]; then break; fi
        kill -0 $server 2>/dev/null || break
        sleep 0.2
    done
    [[ -n $address ]] || {
        cat "$work/preferences/server.log" >&2
        exit 1
    }
    python $parts/vote.py --address "$address" --database "$database" --samples "$images" --taste size
    kill -INT $server
    wait $server || true
    trap - EXIT
    agreement=0
    if $smoke; then agreement=-1; fi
    emu3 preferences pairs "$work/preferences/pairs.parquet" --database "$database" --pairs-per-prompt 2 --keep-ties --min-agreement $agreement
fi

step "6/10 DPO"
if [[ -e $work/dpo_model/config.json ]]; then
    done_already "$work/dpo_model"
else
    emu3 train dpo "$work/preferences/pairs.parquet" --model "$work/qft_model" --output "$work/dpo" --learning-rate 5e-5 --warmup-steps 2 \
        --pairs-per-batch $pairs_per_batch --held-out-share 0 "${dpo[@]}"
    emu3 export model "$work/dpo" --tokenizers "$work/qft_model" --output "$work/dpo_model"
fi

step "7/10 image-to-text: loss on the text alone, with pure language"
if [[ ! -e $work/understanding_documents/manifest.json ]]; then
    python $parts/write_texts.py --samples "$images" --output "$work/texts.jsonl"
    emu3 tokenize "$work/sizes.parquet" "$work/texts.jsonl" --tokenizers "$tokenizers" --output "$work/understanding_documents" \
        --generation-share 0 --languages en
fi
if [[ -e $work/image_to_text_model/config.json ]]; then
    done_already "$work/image_to_text_model"
else
    emu3 train image-to-text "$work/understanding_documents" --model "$base" --output "$work/image_to_text" --learning-rate 1e-4 \
        --text-share 0.2 --validation-split heldout_combination "${rows[@]}" "${image_to_text[@]}"
    emu3 export model "$work/image_to_text" --tokenizers "$tokenizers" --output "$work/image_to_text_model"
fi

step "8/10 questions about the pictures"
if [[ ! -e $work/questions/heldout.json ]]; then
    python $parts/ask_questions.py --samples "$images" --output "$work/questions" ${questions[@]+"${questions[@]}"}
fi
if [[ ! -e $work/conversations.parquet ]]; then
    emu3 tokenize-conversations "$work/questions/train.json" --validation "$work/questions/heldout.json" --model "$work/image_to_text_model" \
        --output "$work/conversations.parquet"
fi

step "9/10 instruction tuning: loss on the answers alone"
if [[ -e $work/instruct_model/config.json ]]; then
    done_already "$work/instruct_model"
else
    emu3 train instruct "$work/conversations.parquet" --model "$work/image_to_text_model" --output "$work/instruct" --learning-rate 3e-4 \
        "${rows[@]}" "${instruct[@]}"
    emu3 export model "$work/instruct" --tokenizers "$tokenizers" --output "$work/instruct_model"
fi

step "10/10 the report"
python $parts/report.py --work "$work" --samples "$images" --base "$base" --taste size ${report[@]+"${report[@]}"}
