"""captions.py and endpoint.py over real HTTP, against a server that answers, stalls, breaks, limits, refuses and talks nonsense."""

import io
import json
import math
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from email.utils import formatdate
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from openemu3.curation.captions import (
    AnswerCache,
    CaptionConfig,
    Captioner,
    CaptionItem,
    choose_frames,
    clean_caption,
    judge_answer,
    load_template,
)
from openemu3.curation.endpoint import Answer, DescribingModel, Endpoint, EndpointConfig, EndpointError, NoAnswerError, Question
from openemu3.records import InputError


def grey_picture(level, size=(40, 30)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (level, level, level)).save(buffer, "PNG")
    return buffer.getvalue()


def pictures(count):
    return [CaptionItem(f"p{number}", "image", grey_picture(10 * number + 5)) for number in range(count)]


def settings(server, **changes):
    return EndpointConfig(**{"base_url": server.url, "model": "m", "first_wait": 0.01, "timeout": 10.0} | changes)


def run(server, items, cache=None, config=None, **changes):
    """Captions of items, and what was used."""
    with Endpoint(settings(server, **changes)) as endpoint:
        captions = list(Captioner(endpoint, cache or AnswerCache(), config).caption(items))
        return captions, endpoint.usage


@pytest.fixture(scope="module")
def make_clip(encode_film):
    """A film whose grey level says the time: two levels per 1/4 s."""

    def make(seconds, fps=4):
        levels = np.arange(round(seconds * fps)) * 250 / max(1, round(seconds * fps) - 1)
        frames = np.repeat(levels.round().astype(np.uint8), 32 * 32 * 3).reshape(-1, 32, 32, 3)
        return encode_film(frames, fps=fps, options={"crf": "1"}), levels

    return make


# --------------------------------------------------------------------------------------------------------------------------- what is asked


def test_a_picture(serve, chat, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret-7")
    server = serve()
    item = CaptionItem("one", "image", grey_picture(120, size=(900, 600)))
    (caption,), usage = run(server, [item], api_key_variable="MY_KEY", temperature=0.5, max_tokens=77, price_in=2.0, price_out=10.0)
    assert (caption.id, caption.text, caption.reason) == ("one", chat.GOOD, "")
    (request,) = server.requests
    assert request.levels == [120] and request.frames[0].shape == (512, 768, 3)
    assert request.prompt.startswith("Describe this picture") and "Answer in English" in request.prompt and "$" not in request.prompt
    assert (request.body["model"], request.body["temperature"], request.body["max_tokens"]) == ("m", 0.5, 77)
    assert request.headers["authorization"] == "Bearer secret-7"
    assert (caption.prompt_tokens, caption.completion_tokens) == (usage.prompt_tokens, usage.completion_tokens) == (100, 20)
    assert caption.cost == usage.cost == pytest.approx((100 * 2 + 20 * 10) / 1e6)


def test_nothing_is_told_about_this_machine(serve):
    server = serve()
    run(server, pictures(1))
    headers = server.requests[0].headers
    assert not [name for name in headers if name.startswith("x-stainless")] and headers["user-agent"] == "openemu3"


def test_a_clip_by_twelve_frames_and_a_label_by_eight(serve, make_clip):
    server, (clip, levels) = serve(), make_clip(12)
    item = CaptionItem("clip", "video", clip)
    run(server, [item])
    run(server, [item], config=CaptionConfig(purpose="label", language="zh"))
    for request, count in zip(server.requests, (12, 8), strict=False):
        middles = [levels[int(12 * (number + 0.5) / count * 4)] for number in range(count)]
        assert request.levels == pytest.approx(middles, abs=2)
        assert f"{count} frames" in request.prompt and "12.0 seconds" in request.prompt
    assert "Chinese" in server.requests[1].prompt and "teach another model" in server.requests[1].prompt


def test_a_longer_clip_in_parts_that_are_merged(serve, chat, make_clip):
    """45 s are three parts of 15; the parts' captions arrive in the question that merges them, in order, dollar signs and all."""
    clip, levels = make_clip(45)

    def reply(request, number):
        words = ["At first a $language price tag", "Then a ${captions} sign", "Last a {brace}"]
        return chat.completion("The whole story, told once." if not request.frames else f"{words[number]} {chat.GOOD}")

    server = serve(reply)
    (caption,), _ = run(server, [CaptionItem("long", "video", clip)])
    *parts, merge = server.requests
    assert [len(request.frames) for request in parts] == [12, 12, 12] and not merge.frames
    for number, request in enumerate(parts):
        middles = [levels[int((15 * number + 15 * (frame + 0.5) / 12) * 4)] for frame in range(12)]
        assert request.levels == pytest.approx(middles, abs=2) and "15.0 seconds" in request.prompt
    told = "\n".join(
        f"[{15 * n} s to {15 * n + 15} s] {words} {chat.GOOD}"
        for n, words in enumerate(["At first a $language price tag", "Then a ${captions} sign", "Last a {brace}"])
    )
    assert told in merge.prompt and "3 parts" in merge.prompt
    assert caption.text == "The whole story, told once."
    assert [(part.start, part.end) for part in caption.parts] == [(0, 15), (15, 30), (30, 45)]
    assert caption.prompt_tokens == 400


@pytest.mark.parametrize("seconds, questions", [(20, 1), (20.5, 3), (40, 3), (41, 4)])
def test_parts_are_ten_to_twenty_seconds(serve, make_clip, seconds, questions):
    server = serve()
    (caption,), _ = run(server, [CaptionItem("clip", "video", make_clip(seconds)[0])])
    assert len(server.requests) == questions
    assert all(10 <= part.end - part.start <= 20.0001 for part in caption.parts)
    assert run(server, [CaptionItem("clip", "video", make_clip(seconds)[0])], config=CaptionConfig(purpose="label"))[0][0].parts == ()


def test_frames_are_chosen_by_what_is_on_screen():
    assert choose_frames([0, 1, 2, 3], 0, 4, 4) == (0, 1, 2, 3)
    assert choose_frames([0, 1, 2, 3], 0, 4, 2) == (1, 3)
    assert choose_frames([0.0, 0.1, 0.2, 3.0], 0, 4, 4) == (2, 3)  # one stands for long
    assert choose_frames([0.0], 0, 0.04, 12) == (0,)
    assert choose_frames([0, 1, 2, 3], 2, 4, 1) == (3,)


def test_captions_come_in_the_order_of_items(serve, chat):
    def reply(request, number):
        level = request.levels[0]
        time.sleep(0.1 if level < 20 else 0)
        return chat.completion(f"Level {level}. {chat.GOOD}")

    captions, _ = run(serve(reply), pictures(9), config=CaptionConfig(concurrency=4))
    assert [caption.id for caption in captions] == [f"p{n}" for n in range(9)]
    assert [caption.text.split(".")[0] for caption in captions] == [f"Level {10 * n + 5}" for n in range(9)]


def test_as_many_questions_at_a_time_as_asked_for(serve, chat):
    """The server answers only when four questions are there, and would see it if there were a fifth."""
    meeting = threading.Barrier(4, timeout=30)

    def reply(request, number):
        meeting.wait()
        return chat.completion()

    server = serve(reply)
    captions, _ = run(server, pictures(12), config=CaptionConfig(concurrency=4), timeout=60.0)
    assert all(caption.text for caption in captions) and server.most_outstanding == 4


def test_items_are_not_drawn_far_ahead(serve):
    drawn = []

    def draw():
        for item in pictures(20):
            drawn.append(item.id)
            yield item

    with Endpoint(settings(serve())) as endpoint:
        captions = Captioner(endpoint, AnswerCache(), CaptionConfig(concurrency=2)).caption(draw())
        next(captions)
        assert len(drawn) == 4
        captions.close()


# ------------------------------------------------------------------------------------------------------------ an endpoint in bad condition


def test_it_stalls(serve, chat):
    """The first answer never comes; the second try is answered."""
    server = serve(lambda request, number: (lambda handler: server.closing.wait(60)) if number == 0 else chat.completion())
    began = time.monotonic()
    (caption,), usage = run(server, pictures(1), timeout=0.4)
    assert caption.text == chat.GOOD and usage.retries == 1 and time.monotonic() - began < 30


def test_it_drips(serve):
    """A byte every 50 ms for ever: each read is quick, and the whole takes too long all the same."""

    def drip(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100000\r\n\r\n")
        while not server.closing.wait(0.05):
            handler.wfile.write(b" ")
            handler.wfile.flush()

    server = serve(lambda request, number: drip)
    began = time.monotonic()
    (caption,), _ = run(server, pictures(1), timeout=0.4, max_attempts=2)
    assert caption.reason == "unanswered: 2 tries failed, the last one with: no answer within 0.4 s"
    assert time.monotonic() - began < 30


def hang_up(handler):
    handler.connection.close()


@pytest.mark.parametrize(
    "bad",
    [
        (500, {}, {"error": {"message": "out of memory"}}),
        (503, {}, b"<html>gateway</html>"),
        (200, {}, b"<html>a log-in page</html>"),
        (200, {}, b'{"choices": [{"message"'),
        (200, {}, b"null"),
        (200, {}, b"[]"),
        (200, {}, {"choices": []}),
        (200, {}, {"choices": [{}]}),
        (200, {}, {"choices": [{"message": {"content": 42}}]}),
        (200, {"content-length": "5000"}, b"{}"),
        hang_up,
    ],
    ids=["500", "503", "html", "cut json", "null", "list", "no choices", "no message", "number", "short body", "hangs up"],
)
def test_it_breaks_and_recovers(serve, chat, bad):
    if isinstance(bad, tuple) and bad[1]:
        bad_reply = lambda handler: handler.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: 5000\r\n\r\n{}")  # noqa: E731
    else:
        bad_reply = bad
    (caption,), usage = run(serve(lambda request, number: bad_reply if number < 2 else chat.completion()), pictures(1))
    assert caption.text == chat.GOOD and usage.retries == 2
    (caption,), usage = run(serve(lambda request, number: bad_reply), pictures(1), max_attempts=2)
    assert caption.text is None and caption.reason.startswith("unanswered: 2 tries failed")


def test_nobody_is_there(serve):
    server = serve()
    server.close()
    (caption,), usage = run(server, pictures(1), max_attempts=3)
    assert caption.reason.startswith("unanswered: 3 tries failed") and usage.requests == 3


@pytest.mark.parametrize("as_date", [False, True])
def test_it_limits_the_rate_and_says_for_how_long(serve, chat, as_date):
    """One question is told to come back in a second or two; no other is asked before that either."""

    def reply(request, number):
        after = formatdate(time.time() + 2, usegmt=True) if as_date else "1"  # dates have whole seconds
        return (429, {"retry-after": after}, {"error": {"message": "slow down"}}) if number == 0 else chat.completion()

    server = serve(reply)
    with Endpoint(settings(server)) as endpoint:
        first = threading.Thread(target=endpoint, args=(Question("one"),))
        first.start()
        while not server.requests:
            time.sleep(0.01)
        time.sleep(0.1)
        assert endpoint(Question("two")).text == chat.GOOD
        first.join()
    gaps = [request.at - server.requests[0].at for request in server.requests[1:]]
    assert len(gaps) == 2 and min(gaps) >= 0.95 and endpoint.usage.retries == 1


def test_an_endpoint_that_asks_for_an_hour_is_not_waited_for(serve):
    server = serve(lambda request, number: (429, {"retry-after": "3600"}, {"error": {"message": "quota"}}))
    (caption,), _ = run(server, pictures(1))
    assert "asks to wait for 3600 s" in caption.reason and len(server.requests) == 1


def test_waits_grow_and_end(serve):
    """0.02 s, 0.04 s and no longer, less up to half; growing on, the waits would add up to 1.27 s at the least."""
    server = serve(lambda request, number: (500, {}, {}))
    run(server, pictures(1), first_wait=0.02, max_wait=0.04, max_attempts=8)
    times = [request.at for request in server.requests]
    assert times[1] - times[0] >= 0.01 and all(b - a >= 0.02 for a, b in zip(times[1:], times[2:], strict=False))
    assert times[-1] - times[0] < 1.2


def test_requests_per_minute(serve):
    """Half a second apart; a busy machine may take the first in late, but not by that much."""
    server = serve()
    run(server, pictures(3), requests_per_minute=120)
    times = sorted(request.at for request in server.requests)
    assert times[2] - times[0] >= 0.75


@pytest.mark.parametrize(
    "status, code, words", [(401, None, "401"), (403, None, "403"), (404, None, "no such model"), (429, "insufficient_quota", "429")]
)
def test_a_wrong_set_up_stops_the_run(serve, status, code, words):
    server = serve(lambda request, number: (status, {}, {"error": {"message": "no such model or key", "code": code}}))
    with pytest.raises(EndpointError, match=words):
        run(server, pictures(30), config=CaptionConfig(concurrency=2))
    assert len(server.requests) <= 4


def test_a_question_that_is_not_taken_is_not_asked_twice(serve):
    server, cache = serve(lambda request, number: (400, {}, {"error": {"message": "context too long"}})), AnswerCache()
    for _ in range(2):
        (caption,), _ = run(server, pictures(1), cache)
        assert caption.reason.startswith("unanswered: the endpoint does not take the question: status 400")
    assert len(server.requests) == 1


def test_the_money_is_spent(serve):
    """An answer costs 0.0012; after the third, 0.003 is passed."""
    server, cache = serve(), AnswerCache()
    with pytest.raises(EndpointError, match="max_cost is 0.003"):
        run(server, pictures(10), cache, CaptionConfig(concurrency=1), price_in=10.0, price_out=10.0, max_cost=0.003)
    assert len(server.requests) == 3 and cache.count() == 3


# ------------------------------------------------------------------------------------------------------------------- answers that are none


ANSWERS = [
    ("I'm sorry, but I can't help with identifying people in images.", {}, "refused"),
    ("I’m unable to describe this picture.", {}, "refused"),
    ("I cannot provide a description of this content.", {}, "refused"),
    ("As an AI language model, I have no eyes.", {}, "refused"),
    ("There is no image provided in your message. Please upload one.", {}, "refused"),
    ("抱歉，我无法描述这张图片的内容。", {}, "refused"),
    ("anything", {"refusal": "policy"}, "refused"),
    ("A man stands at", {"finish": "content_filter"}, "refused"),
    ("", {}, "empty"),
    (" \n\t ", {}, "empty"),
    ("<think>They want a caption.</think>", {}, "empty"),
    ("<think>They want a caption, and", {"finish": "length"}, "cut off"),
    ("A red ball rolls over a table and then the", {"finish": "length"}, "cut off"),
    ("", {"finish": "length"}, "cut off"),
    ("a cat sits and " * 80, {}, "nonsense: it repeats itself"),
    ("a cat sits and " * 80, {"finish": "length"}, "nonsense: it repeats itself"),
    ("yes yes yes yes yes yes yes yes yes yes yes yes", {}, "nonsense: it repeats itself"),
    ("{}[]()!!! 1234 5678 ---- #### @@@@ %%%% a b", {}, "nonsense: hardly any letters"),
    ("A red ball \ud800 rolls over the table.", {}, "nonsense: characters"),
    ("A red ball \ufffd\ufffd rolls over the table.", {}, "nonsense: characters"),
    ("A ball.", {}, "nonsense: shorter than 5 words"),
    ("一个红色的球在桌子上滚动，光线温暖，镜头静止不动。", {}, "nonsense: not in English"),
]


@pytest.mark.parametrize("text, more, reason", ANSWERS)
def test_answers_that_are_no_captions(text, more, reason):
    answer = Answer(text, more.get("finish", "stop"), more.get("refusal", ""))
    verdict = judge_answer(answer, clean_caption(text), "Describe this picture for somebody who cannot see it.", CaptionConfig())
    assert verdict.startswith(reason)
    verdict.encode()  # whatever came, the reason can be written to a file


@pytest.mark.parametrize(
    "text, language",
    [
        ('A sign on the door says "Sorry, we can\'t help you today" in red letters.', "en"),
        ("I-beams of steel stand in rows on a building site under a grey sky.", "en"),
        ('Sorrel horses graze on a meadow; please note the "No image" poster on the fence.', "en"),
        ("A chart with the values 10, 20 and 30 for the years 2019, 2020 and 2021.", "en"),
        ("<|image start|>64*64<|image token|> is written on a wall in white paint.", "en"),
        ("🎉 A girl in a blue dress throws confetti; 😀 is printed on her bag.", "en"),
        ("一个红色的球在桌子上滚动，光线温暖，镜头静止不动。", "zh"),
        ("나무 탁자 위로 빨간 공이 천천히 굴러간다.", "ko"),
        ("Ein roter Ball rollt langsam über den Tisch, während die Kamera stillsteht.", "de"),
    ],
)
def test_captions_are_not_mistaken_for_refusals(text, language):
    assert judge_answer(Answer(text), clean_caption(text), "Describe this.", CaptionConfig(language=language)) == ""


def test_real_captions_pass(pytestconfig):
    """Those of the mini model's samples, long and short, in two languages; the shortest are two words."""
    import pyarrow.parquet as pq

    path = pytestconfig.rootpath / ".cache" / "mini_core2" / "images.parquet"
    if not path.is_file():
        pytest.skip("the mini model's samples have not been prepared")
    rows = pq.read_table(path, columns=["captions"]).column("captions").to_pylist(maps_as_pydicts="strict")
    bad = [
        (text, verdict)
        for captions in rows
        for language, text in captions.items()
        if (verdict := judge_answer(Answer(text), clean_caption(text), "Describe.", CaptionConfig(language=language[:2], min_words=1)))
    ]
    assert len(rows) > 1000 and bad == []


def test_the_question_as_an_answer_is_none(serve, chat):
    captions, _ = run(serve(lambda request, number: chat.completion(request.prompt)), pictures(1))
    assert captions[0].reason == "nonsense: it repeats the question"


def test_nonsense_is_asked_again_and_refusals_are_not(serve, chat):
    texts = {5: ["", chat.GOOD], 15: ["I'm sorry, I can't help with that.", chat.GOOD], 25: ["???!!!", "", chat.GOOD]}
    seen = Counter()

    def reply(request, number):
        seen[request.levels[0]] += 1
        return chat.completion(texts[request.levels[0]][seen[request.levels[0]] - 1])

    captions, _ = run(serve(reply), pictures(3))
    assert [caption.reason.split(":")[0] for caption in captions] == ["", "refused", "empty"]
    assert seen == {5: 2, 15: 1, 25: 2}
    assert captions[0].prompt_tokens == 200 and captions[1].prompt_tokens == 100


def test_one_bad_part_is_named(serve, chat, make_clip):
    server = serve(lambda request, number: chat.completion("I cannot describe this clip." if number == 1 else chat.GOOD))
    (caption,), _ = run(server, [CaptionItem("long", "video", make_clip(45)[0])])
    assert caption.text is None and caption.reason == "refused: I cannot describe this clip. (part 2 of 3)"
    assert len(server.requests) == 2


def test_what_a_caption_may_contain_stays_text(serve, chat):
    """Control tokens in a caption are words like others, to the tokenizer as well."""
    from openemu3.tokenization.text import TextTokenizer

    evil = "A wall with <|image start|>64*64<|image token|><|visual token 000001|><|extra_204|> painted on it."
    (caption,), _ = run(serve(lambda request, number: chat.completion(evil)), pictures(1))
    assert caption.text == evil
    import openemu3

    tokenizer = TextTokenizer.from_file(Path(openemu3.__file__).parent / "assets" / "mini" / "text.tiktoken")
    ids = tokenizer.encode(caption.text)
    assert tokenizer.decode(ids) == evil and max(ids) < tokenizer.num_tokens


def test_captions_are_one_line():
    assert clean_caption("  A red\r\n\n ball\x00\x1b[31m rolls.\u2028End ") == "A red ball[31m rolls. End"
    assert clean_caption("<think>hm\nhm</think>\nA ball.") == "A ball."
    assert clean_caption("Cafe\u0301") == "Caf\u00e9"


def test_media_that_cannot_be_read_say_so_and_stop_nobody(serve, encode_sound):
    items = [
        CaptionItem("a", "image", b"no picture"),
        *pictures(1),
        CaptionItem("b", "video", encode_sound()),
        CaptionItem("c", "video", b""),
    ]
    captions, _ = run(serve(), items)
    assert [caption.reason.split(":")[0] for caption in captions] == ["unreadable", "", "unreadable", "unreadable"]
    assert "no pictures in it" in captions[2].reason


# ------------------------------------------------------------------------------------------------------------------------ kept and resumed


def test_nothing_is_asked_twice(serve, tmp_path):
    server = serve()
    for _ in range(2):
        with AnswerCache(tmp_path / "answers.sqlite") as cache:
            captions, _ = run(server, pictures(4), cache)
            assert all(caption.text for caption in captions)
    assert len(server.requests) == 4
    assert captions[0].prompt_tokens == 0 and captions[0].cost == 0
    with AnswerCache(tmp_path / "answers.sqlite") as cache:
        renamed = [CaptionItem(f"other {item.id}", item.kind, item.media) for item in pictures(4)]
        assert [caption.id for caption in run(server, renamed, cache)[0]] == [item.id for item in renamed] and len(server.requests) == 4
        run(server, pictures(4), cache, model="another")
        assert len(server.requests) == 8
        run(server, pictures(4), cache, CaptionConfig(language="de"))
        assert len(server.requests) == 12
        (tmp_path / "templates").mkdir()
        (tmp_path / "templates" / "image.txt").write_text("Say in $language what this is.")
        run(server, pictures(4), cache, CaptionConfig(templates=tmp_path / "templates"))
        assert server.requests[-1].prompt == "Say in English what this is." and len(server.requests) == 16


def test_kept_refusals_can_be_asked_again(serve, chat):
    server, cache = serve(lambda request, number: chat.completion("Sorry, no." if number == 0 else chat.GOOD)), AnswerCache()
    assert run(server, pictures(1), cache)[0][0].reason == "refused: Sorry, no."
    assert run(server, pictures(1), cache)[0][0].reason == "refused: Sorry, no." and len(server.requests) == 1
    assert run(server, pictures(1), cache, CaptionConfig(ask_again=True))[0][0].text == chat.GOOD
    assert run(server, pictures(1), cache, CaptionConfig(ask_again=True))[0][0].text == chat.GOOD and len(server.requests) == 2


def test_parts_that_were_answered_are_kept(serve, chat, make_clip):
    """A long clip that fails at its merging is taken up there."""
    item, cache = CaptionItem("long", "video", make_clip(45)[0]), AnswerCache()
    broken = serve(lambda request, number: chat.completion() if request.frames else (500, {}, {}))
    assert run(broken, [item], cache, max_attempts=1)[0][0].reason.startswith("unanswered")
    healthy = serve()
    assert run(healthy, [item], cache)[0][0].text == chat.GOOD
    assert [len(request.frames) for request in healthy.requests] == [0]


@pytest.mark.slow
def test_killed_runs_ask_nothing_twice(serve, chat, tmp_path):
    """kill -9 after some answers, three times; then to the end: all are answered, and only what was outstanding was asked again."""
    answered = threading.Semaphore(0)

    def reply(request, number):
        time.sleep(0.02)
        answered.release()
        return chat.completion(f"Level {request.levels[0]}. {chat.GOOD}")

    server, concurrency = serve(reply), 2
    code = f"""
        import io, sys
        from PIL import Image
        from openemu3.curation.captions import AnswerCache, CaptionConfig, Captioner, CaptionItem
        from openemu3.curation.endpoint import Endpoint, EndpointConfig

        def items():
            for level in range(0, 240, 10):
                buffer = io.BytesIO()
                Image.new("L", (32, 32), level).save(buffer, "PNG")
                yield CaptionItem(str(level), "image", buffer.getvalue())

        with Endpoint(EndpointConfig({server.url!r}, "m")) as endpoint, AnswerCache({str(tmp_path / "a.sqlite")!r}) as cache:
            for caption in Captioner(endpoint, cache, CaptionConfig(concurrency={concurrency})).caption(items()):
                print(caption.id, caption.text.split(".")[0], flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    kills = 3
    for _ in range(kills):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        for _ in range(4):
            assert answered.acquire(timeout=60)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert output == [f"{level} Level {level}" for level in range(0, 240, 10)]
    asked = Counter(request.levels[0] for request in server.requests)
    assert set(asked) == set(range(0, 240, 10))
    assert sum(asked.values()) <= 24 + kills * concurrency


@pytest.mark.slow
def test_ctrl_c_does_not_wait_for_a_server_that_stalls(serve):
    server = serve(lambda request, number: lambda handler: server.closing.wait(300))
    code = f"""
        import io
        from PIL import Image
        from openemu3.curation.captions import AnswerCache, Captioner, CaptionItem
        from openemu3.curation.endpoint import Endpoint, EndpointConfig

        buffer = io.BytesIO()
        Image.new("L", (32, 32)).save(buffer, "PNG")
        with Endpoint(EndpointConfig({server.url!r}, "m", timeout=200)) as endpoint, AnswerCache() as cache:
            list(Captioner(endpoint, cache).caption([CaptionItem("a", "image", buffer.getvalue())]))
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stderr=subprocess.PIPE, text=True)
    while not server.requests:
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and errors.strip().endswith("KeyboardInterrupt")


def test_a_file_that_is_no_cache(tmp_path):
    (tmp_path / "notes.txt").write_text("shopping list\n" * 100)
    with pytest.raises(InputError, match="notes.txt"):
        AnswerCache(tmp_path / "notes.txt")


# --------------------------------------------------------------------------------------------------------------------------- our own model


def test_our_own_model_describes(make_clip):
    """Shown frames and their rate, one item at a time; the parts of a long clip stand one after the other."""
    shown, busy = [], threading.Lock()

    def describe(frames, fps):
        assert busy.acquire(blocking=False)
        shown.append((len(frames), frames[0].size, fps))
        time.sleep(0.01)
        busy.release()
        return f"Something of {len(frames)} frames at number {len(shown)} is to be seen here."

    items = [*pictures(3), CaptionItem("long", "video", make_clip(30)[0])]
    model = DescribingModel(describe, "ours")
    captions = list(Captioner(model, AnswerCache()).caption(items))
    assert all(caption.reason == "" for caption in captions)
    assert sorted(shown) == [(1, (40, 30), 1.0)] * 3 + [(12, (32, 32), pytest.approx(0.8))] * 2
    assert [caption.text for caption in captions][3] == " ".join(part.text for part in captions[3].parts)
    with pytest.raises(NoAnswerError, match="describes pictures"):
        model(Question("no frames"))


@pytest.mark.slow
def test_the_mini_model_describes():
    """The shipped weights behind the same call."""
    from openemu3.generation.tasks import Emu3

    mini = Emu3.load("mini")
    model = DescribingModel(lambda frames, fps: mini.describe(frames[0].resize((64, 64)), max_new_tokens=12), "mini")
    (caption,) = Captioner(model, AnswerCache(), CaptionConfig(min_words=1)).caption(pictures(1))
    assert caption.text or caption.reason.startswith(("nonsense", "empty", "cut off"))


# ------------------------------------------------------------------------------------------------------------------ templates and settings


@pytest.mark.parametrize("name", ["image", "video", "video_label", "video_merge"])
def test_shipped_templates_ask_for_a_language(name):
    template = load_template(name)
    assert "language" in template.get_identifiers()
    assert "\n\n" in template.template and 400 < len(template.template) < 2500


@pytest.mark.parametrize("text, word", [("Say it in $tongue.", "tongue"), ("It costs 5 $.", r"\$"), ("${seconds} long", "seconds")])
def test_templates_with_unknown_places(tmp_path, text, word):
    (tmp_path / "image.txt").write_text(text)
    with pytest.raises(InputError, match=f"placeholder '{word}'"):
        load_template("image", tmp_path)


def test_templates_that_cannot_be_read(tmp_path):
    (tmp_path / "image.txt").write_bytes(b"\xff\xfe\x00 no text")
    with pytest.raises(InputError, match="not text in UTF-8"):
        load_template("image", tmp_path)
    with pytest.raises(InputError, match="is not there"):
        load_template("image", tmp_path / "missing")
    assert "paint it" in load_template("image", Path(tmp_path / "..")).template


@pytest.mark.parametrize(
    "field, value",
    [
        ("base_url", "localhost:8000"),
        ("model", ""),
        ("max_tokens", 0),
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("timeout", 0.0),
        ("max_attempts", 0),
        ("requests_per_minute", 0.0),
        ("price_in", -1.0),
        ("max_cost", 1.0),
    ],
)
def test_impossible_endpoints(field, value):
    with pytest.raises(InputError, match=field):
        EndpointConfig(**{"base_url": "http://localhost:1", "model": "m", field: value})


@pytest.mark.parametrize("field, value", [("language", "xx"), ("short_edge", 8), ("min_words", 0), ("max_asks", 0), ("concurrency", 0)])
def test_impossible_questions(field, value):
    with pytest.raises(InputError, match=field):
        CaptionConfig(**{field: value})


def test_the_cache_says_in_words_what_was_asked(serve, tmp_path):
    import sqlite3

    with AnswerCache(tmp_path / "a.sqlite") as cache:
        run(serve(), pictures(1), cache)
    rows = sqlite3.connect(tmp_path / "a.sqlite").execute("SELECT asked, reason FROM answers").fetchall()
    assert len(rows) == 1 and rows[0][1] == ""
    assert {"media", "template", "template_hash", "model", "language"} <= set(json.loads(rows[0][0]))
