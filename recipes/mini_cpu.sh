#!/usr/bin/env bash
# The mini model from nothing to weights, on a CPU: fetch, prepare, tokenizers, documents, training, export.
#
#   recipes/mini_cpu.sh [--smoke] [--work FOLDER] [--output FOLDER] [--packages FOLDER]
#
#   --work      where everything in between goes (default: runs/mini_cpu, or runs/mini_cpu_smoke)
#   --output    the model folder to write (default: WORK/model); use it as: emu3 generate image "3D panda" --model FOLDER
#   --packages  where the fetched npm packages are or go (default: .cache/npm)
#   --smoke     the same steps on few pictures and for a few seconds each: a minute or two once the packages are there.
#               The model draws noise; it shows that everything is in place.
#
# Stop it whenever you like and start it again: what is complete is skipped, and a training goes on from its last checkpoint.
# For other settings name another --work folder. Needs npm, and: pip install -e '.[recipes]'

set -euo pipefail
caller=$PWD
cd "$(dirname "$0")/.."

smoke=false work= output= packages=.cache/npm
while (($#)); do
    case $1 in
    --smoke) smoke=true ;;
    --work | --output | --packages)
        if (($# < 2)); then
            echo "mini_cpu.sh: $1 needs a folder" >&2
            exit 2
        fi
        if [[ $2 == /* ]]; then folder=$2; else folder=$caller/$2; fi
        printf -v "${1#--}" %s "$folder"
        shift
        ;;
    --help | -h)
        sed -n '2,/^$/s/^# \{0,1\}//p' "recipes/$(basename "$0")"
        exit 0
        ;;
    *)
        echo "mini_cpu.sh: $1 is unknown; allowed are --smoke, --work FOLDER, --output FOLDER and --packages FOLDER" >&2
        exit 2
        ;;
    esac
    shift
done
if $smoke; then work=${work:-runs/mini_cpu_smoke}; else work=${work:-runs/mini_cpu}; fi
output=${output:-$work/model}
data=$work/data core=$work/core

# The repository's own environment if there is one, else whatever is on the path.
if [[ -x .venv/bin/emu3 ]]; then PATH=$PWD/.venv/bin:$PATH; fi
command -v emu3 >/dev/null || {
    echo "mini_cpu.sh: the command emu3 is missing; run: pip install -e '.[recipes]'" >&2
    exit 2
}

# What is small in a smoke test. (An empty list is spelt ${list[@]+...} below: bash before 4.4 calls it unset.)
pictures=() clips=() vision=() decoder=() language=()
if $smoke; then
    pictures=(--max-samples 500)
    clips=(--max-samples 16 --sizes.videos 2)
    core=$data # of so few, the core would have no clip, and too few words for 2,048 tokens
    vision=(--num-steps 12 --images-per-batch 8 --max-validation 16)
    decoder=(--num-steps 5 --images-per-batch 4 --max-validation 16)
    language=(--num-steps 8 --tokens-per-batch 1024 --max-validation 32)
fi

step() { printf '\n== %s\n' "$*" >&2; }
done_already() { echo "   is there already: $*" >&2; }

step "1/10 fetch pictures, clips, names and LPIPS"
python recipes/mini/fetch_data.py --folder "$packages"
python recipes/fetch_weights.py --only lpips

step "2/10 prepare samples: 64 x 64 pictures, clips of 8 frames a second, captions, splits"
if [[ -e $data/images.parquet ]]; then
    done_already "$data/images.parquet"
else
    python recipes/mini/prepare_samples.py images --packages "$packages" --output "$data" ${pictures[@]+"${pictures[@]}"}
fi
if [[ -e $data/videos.parquet ]]; then
    done_already "$data/videos.parquet"
else
    python recipes/mini/prepare_samples.py videos --packages "$packages" --output "$data" ${clips[@]+"${clips[@]}"}
fi

step "3/10 choose the core, which is learnt"
if [[ -e $core/images.parquet && -e $core/videos.parquet ]]; then
    done_already "$core"
else
    python recipes/mini/select_core.py --data "$data" --output "$core"
fi

step "4/10 learn the text vocabulary"
if [[ -e $work/text.tiktoken ]]; then
    done_already "$work/text.tiktoken"
else
    python recipes/mini/train_text.py --samples "$core/images.parquet" "$core/videos.parquet" --output "$work/text.tiktoken"
fi

step "5/10 train the vision tokenizer"
emu3 train vision-tokenizer "$core/images.parquet" "$core/videos.parquet" --output "$work/vision" ${vision[@]+"${vision[@]}"}

step "6/10 export the tokenizers"
if [[ -e $work/tokenizers/config.json ]]; then
    done_already "$work/tokenizers"
else
    emu3 export tokenizers "$work/vision" --text "$work/text.tiktoken" --output "$work/tokenizers"
fi

step "7/10 tokenize"
if [[ -e $work/documents/manifest.json ]]; then
    done_already "$work/documents"
else
    emu3 tokenize "$core/images.parquet" "$core/videos.parquet" --tokenizers "$work/tokenizers" --output "$work/documents"
fi

step "8/10 train the language model"
emu3 train language "$work/documents" --tokenizers "$work/tokenizers" --output "$work/language" ${language[@]+"${language[@]}"}

step "9/10 train the vision decoder on, with the codes frozen"
emu3 train vision-tokenizer "$core/images.parquet" "$core/videos.parquet" --preset mini-decoder --init-from "$work/vision" \
    --output "$work/decoder" ${decoder[@]+"${decoder[@]}"}

step "10/10 export the model"
if [[ -e $output/config.json ]]; then
    done_already "$output"
else
    emu3 export tokenizers "$work/decoder" --text "$work/text.tiktoken" --output "$work/tuned_tokenizers"
    emu3 export model "$work/language" --tokenizers "$work/tuned_tokenizers" --output "$output"
fi
if $smoke; then
    echo "   no samples for emu3 demo: a smoke test has too few pictures to choose from"
elif [[ ! -e $output/demo.parquet ]]; then
    python recipes/mini/choose_demo_samples.py --data "$core" --output "$output/demo.parquet"
fi

step "$output is complete; try: emu3 demo --model $output"
