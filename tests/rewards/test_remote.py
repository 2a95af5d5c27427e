"""RemoteReward against a real HTTP server that answers, fails, stalls and talks nonsense."""

import base64
import io
import itertools
import json
import math
import random
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import yaml
from PIL import Image

from cotgen_pl.interfaces import Prompt, Reward, Scores
from cotgen_pl.pixels import to_pillow
from cotgen_pl.rewards.ensemble import Ensemble
from cotgen_pl.rewards.remote import RemoteReward, read_number, read_yes_probability

IMAGES = torch.linspace(0, 1, 6 * 3 * 4 * 5).view(6, 3, 4, 5)
PROMPTS = [Prompt(f"prompt {i}") for i in range(6)]
QUESTION = "How well does it show {prompt}? Answer {1 to 5} after 'Final Score:'."
SECRET = "sk-very-secret"


class Handler(BaseHTTPRequestHandler):
    """Does what the server's `answer(request)` returns."""

    def do_GET(self):
        self.reply(200, {"data": [{"id": "judge"}, {"id": "other"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append((self.path, dict(self.headers), body))
            number = len(self.server.requests)
        action = self.server.answer(Asked(body), number)
        if callable(action):
            action(self)
        elif isinstance(action, tuple):
            self.reply(*action)
        else:
            self.reply(200, action)

    def reply(self, status, content, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


class Asked:
    """A request, read back: the picture that it holds and the question."""

    def __init__(self, body):
        address, question = body["messages"][0]["content"]
        self.kind, _, data = address["image_url"]["url"].partition(",")
        self.picture = Image.open(io.BytesIO(base64.b64decode(data)))
        self.text = question["text"]

    @property
    def brightness(self):
        pixels = list(self.picture.convert("L").tobytes())
        return sum(pixels) / len(pixels) / 255


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def handle_error(self, request, client_address):
        """Clients that hang up are part of the tests."""


@pytest.fixture
def serve():
    """Starts a server that does what `answer(asked, number of the request)` says."""
    servers = []

    def start(answer=lambda asked, number: says("Final Score: 3")):
        server = Server(("127.0.0.1", 0), Handler)
        server.answer, server.requests, server.lock = answer, [], threading.Lock()
        server.url = f"http://127.0.0.1:{server.server_port}/v1"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def says(text, reason="stop"):
    return {"choices": [{"message": {"content": text}, "finish_reason": reason}]}


def thinks(**probabilities):
    """A first token's alternatives; underscores stand for spaces."""
    tokens = [
        {"token": word.replace("_", " "), "logprob": math.log(p)}
        for word, p in probabilities.items()
    ]
    return {"choices": [{"message": {"content": "."}, "logprobs": first_token(tokens)}]}


def first_token(tokens):
    return {"content": [{"top_logprobs": tokens}]}


def make(server, **settings):
    quick = {"timeout_s": 5.0, "retries": 2, "backoff_s": 0.01}
    url = server if isinstance(server, str) else server.url
    return RemoteReward(url, "judge", **({"question": QUESTION} | quick | settings))


def score(reward, number=6):
    return reward.score(IMAGES[:number], PROMPTS[:number])


def failures(scores):
    return [entry.get("failure") for entry in scores.details]


def test_a_judge_is_asked_with_the_picture_and_the_prompt(serve):
    server = serve(lambda asked, number: says(f"Well.\nFinal Score: {4 * asked.brightness + 1}"))
    prompts = [Prompt("a {red} 'cat' {prompt}"), Prompt("二匹の猫")]
    scores = make(server).load().score(IMAGES[:2], prompts)
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions" and headers["Content-Type"] == "application/json"
    assert body["model"] == "judge" and body["temperature"] == 0 and body["max_tokens"] == 512
    asked = sorted((Asked(body) for _, _, body in server.requests), key=lambda a: a.brightness)
    texts = [QUESTION.replace("{prompt}", prompt.text) for prompt in prompts]
    assert [a.text for a in asked] == texts
    for entry, picture in zip(asked, to_pillow(IMAGES[:2]), strict=True):
        assert entry.kind == "data:image/png;base64" and entry.picture.format == "PNG"
        assert entry.picture.mode == "RGB" and entry.picture.tobytes() == picture.tobytes()
    expected = [4 * a.brightness + 1 for a in asked]
    torch.testing.assert_close(scores.total, torch.tensor(expected))
    assert scores.total.dtype == torch.float32 and list(scores.parts) == ["remote"]
    assert scores.details[0]["answer"].startswith("Well.\nFinal Score: ")


def test_scores_follow_their_picture_and_their_prompt(serve):
    def answer(asked, number):
        return says(f"Final Score: {1 + asked.brightness + asked.text.count('cat')}")

    reward = make(serve(answer))
    prompts = [Prompt("cat " * (i % 3)) for i in range(6)]
    total = reward.score(IMAGES, prompts).total
    order = [5, 0, 3, 1, 4, 2]
    shuffled = reward.score(IMAGES[order], [prompts[i] for i in order]).total
    assert torch.equal(shuffled, total[order]) and len(set(total.tolist())) == 6
    alone = torch.cat([reward.score(IMAGES[i : i + 1], prompts[i : i + 1]).total for i in range(6)])
    assert torch.equal(alone, total)
    other = reward.score(IMAGES, [Prompt("cat")] * 6).total
    assert not torch.equal(other, total)


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_pictures_and_transparent_ones_are_sent_as_rgb(serve, channels):
    server = serve()
    make(server).score(torch.rand(1, channels, 4, 4), PROMPTS[:1])
    assert Asked(server.requests[0][2]).picture.mode == "RGB"


def test_requests_are_concurrent_up_to_the_bound(serve):
    now, most, lock, three = [0], [0], threading.Lock(), threading.Barrier(3, timeout=5)

    def answer(asked, number):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        three.wait()
        time.sleep(0.05)  # a fourth one would come in here
        with lock:
            now[0] -= 1
        return says("Final Score: 3")

    assert score(make(serve(answer), concurrency=3)).total.tolist() == [3.0] * 6
    assert most[0] == 3


def test_yes_probability_is_read_from_the_first_token(serve):
    server = serve(lambda asked, number: thinks(yes=0.3, _Yes=0.2, no=0.1, NO=0.025, maybe=0.3))
    reward = make(server, reading="yes_probability", name="orm")
    scores = score(reward, 1)
    assert scores.parts["orm"].item() == pytest.approx(0.5 / 0.625)
    assert scores.details[0] == {"yes": pytest.approx(0.5), "no": pytest.approx(0.125)}
    body = server.requests[0][2]
    assert body["logprobs"] is True and body["top_logprobs"] == 20 and body["max_tokens"] == 1
    assert body["temperature"] == 1


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (says("yes"), "no top_logprobs"),
        ({"choices": [{"message": {}, "logprobs": None}]}, "no top_logprobs"),
        ({"choices": [{"message": {}, "logprobs": {"content": []}}]}, "no top_logprobs"),
        ({"choices": [{"message": {}, "logprobs": first_token([{"token": 1}])}]}, "top_logprobs"),
        (thinks(Sure=0.9, yes=0.05, no=0.01), "with probability 0.06"),
    ],
)
def test_probabilities_that_are_not_there_are_no_verdict(serve, reply, reason):
    scores = score(make(serve(lambda asked, number: reply), reading="yes_probability"), 2)
    assert scores.total.isnan().all() and all(reason in told for told in failures(scores))


def test_a_word_that_is_not_among_the_alternatives_counts_as_nothing():
    assert read_yes_probability(thinks(yes=0.9, maybe=0.1))[0] == 1.0
    assert read_yes_probability(thinks(No=0.9, maybe=0.1))[0] == 0.0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Final Score: 4", 4.0),
        ("Final Score:3.5 of 5", 3.5),
        ("Final Score: 2, no: Final Score: 3", 2.0),
        ("Final Score: 5.0.", 5.0),
    ],
)
def test_the_first_number_behind_the_words_is_the_score(text, value):
    reward = make("http://localhost/v1")
    assert read_number(says(text), reward.pattern, 1, 5) == (value, {"answer": text})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("It is fine.", "without"),
        ("", "without"),
        ("Final Score: 10", "from 1.0 to 5.0"),
        ("Final Score: 5.7", "from 1.0 to 5.0"),
        ("Final Score: -3", "from 1.0 to 5.0"),
        (None, "without text"),
        (["Final Score: 3"], "without text"),
    ],
)
def test_answers_without_a_score_are_no_verdict_and_are_not_asked_again(serve, text, reason):
    server = serve(lambda asked, number: says(text))
    scores = score(make(server), 2)
    assert scores.total.isnan().all() and len(server.requests) == 2
    assert all(reason in told for told in failures(scores))


def test_a_number_that_is_cut_off_is_no_verdict(serve):
    texts = {"prompt 0": "Final Score: 4", "prompt 1": "Final Score: 4. For"}

    def answer(asked, number):
        return says(next(t for name, t in texts.items() if name in asked.text), "length")

    scores = score(make(serve(answer)), 2)
    assert scores.total.isnan().tolist() == [True, False] and scores.total[1] == 4
    assert "max_tokens" in failures(scores)[0]


def truncate(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "500")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [{"mess')


def hang_up(handler):
    handler.connection.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (truncate, "no JSON"),
        (hang_up, "no answer but "),
        ((200, b"<html>busy</html>"), "<html>busy"),
        ((200, b""), "no JSON"),
        ((200, b"[" * 100_000), "no JSON"),
        ((200, b"\xff\xfe"), "no JSON"),
        ((200, []), "no chat completion"),
        ((200, {"error": "busy"}), "busy"),
        ((200, {"choices": []}), "no chat completion"),
        ((200, {"choices": [{"message": "text"}]}), "no chat completion"),
        ((500, b"out of memory"), "HTTP 500 Internal Server Error: 'out of memory'"),
        ((503, b""), "HTTP 503"),
        ((429, b""), "HTTP 429"),
    ],
)
def test_what_may_pass_is_asked_again_and_then_no_verdict(serve, broken, reason):
    server = serve(lambda asked, number: broken if number <= 2 else says("Final Score: 2"))
    assert score(make(server), 1).total.tolist() == [2.0]  # the third time
    server.requests.clear()
    server.answer = lambda asked, number: broken
    scores = score(make(server), 1)
    assert scores.total.isnan().all() and reason in failures(scores)[0]
    assert len(server.requests) == 3


@pytest.mark.parametrize("status", [400, 401, 404, 413])
def test_what_the_request_is_to_blame_for_is_not_asked_again(serve, status):
    server = serve(lambda asked, number: (status, {"message": "too long"}))
    scores = score(make(server), 1)
    assert f"HTTP {status}" in failures(scores)[0] and "too long" in failures(scores)[0]
    assert len(server.requests) == 1


def test_retry_after_is_waited_for(serve):
    times = []

    def answer(asked, number):
        times.append(time.monotonic())
        if number == 1:
            return lambda handler: handler.reply(429, {}, Retry_After="1")
        return says("Final Score: 2")

    assert score(make(serve(answer)), 1).total.tolist() == [2.0]
    assert times[1] - times[0] >= 0.99


def test_a_server_that_wants_to_rest_for_long_is_given_up(serve):
    server = serve(lambda a, n: lambda handler: handler.reply(429, {}, Retry_After="3600"))
    assert "wait 3600" in failures(score(make(server), 1))[0] and len(server.requests) == 1


@pytest.mark.parametrize("rest", ["soon", "-1", "Wed, 21 Oct 2015 07:28:00 GMT", "nan"])
def test_other_ways_to_say_retry_after_leave_the_own_wait(serve, rest):
    def answer(asked, number):
        busy = number == 1
        return (lambda h: h.reply(503, {}, Retry_After=rest)) if busy else says("Final Score: 2")

    assert score(make(serve(answer)), 1).total.tolist() == [2.0]


def stall(handler):
    time.sleep(3)


def trickle(handler):
    handler.send_response(200)
    handler.end_headers()
    for _ in range(150):
        handler.wfile.write(b" ")
        time.sleep(0.02)


def trickle_headers(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    for _ in range(150):
        handler.wfile.write(b"X: 1\r\n")
        time.sleep(0.02)


@pytest.mark.parametrize("slow", [stall, trickle, trickle_headers])
def test_a_server_that_stalls_is_left(serve, slow):
    reward = make(serve(lambda asked, number: slow), timeout_s=0.15, retries=0)
    started = time.monotonic()
    scores = score(reward, 4)
    # All of these replies take 3 seconds.
    assert time.monotonic() - started < 2
    assert scores.total.isnan().all() and failures(scores) == ["no answer within 0.15 s"] * 4


def test_a_reply_without_end_is_left(serve):
    server = serve(lambda asked, number: (200, b" " * (2**22 + 1)))
    assert "more than 4194304 bytes" in failures(score(make(server), 1))[0]


def test_waits_grow_and_no_random_state_moves(serve):
    times = []

    def answer(asked, number):
        times.append(time.monotonic())
        return 500, {}

    states = torch.get_rng_state(), random.getstate()
    score(make(serve(answer), retries=3, backoff_s=0.04), 1)
    waits = [after - before for before, after in itertools.pairwise(times)]
    assert [w >= low for w, low in zip(waits, [0.02, 0.04, 0.08], strict=True)] == [True] * 3
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]


def test_one_failure_leaves_the_others_their_verdicts(serve):
    def answer(asked, number):
        return (500, {}) if "prompt 2" in asked.text else says("Final Score: 3")

    scores = score(make(serve(answer)))
    assert scores.total.isnan().tolist() == [False, False, True, False, False, False]
    assert [told is None for told in failures(scores)] == [True, True, False, True, True, True]


def test_failures_in_a_row_stop_the_run_over_calls_and_leave_the_rest_unasked(serve):
    stopped = threading.Event()

    def answer(asked, number):
        if number > 4:
            stopped.wait(5)
        return 500, b"out of memory"

    server = serve(answer)
    reward = make(server, stop_after=4, retries=0, concurrency=1)
    assert score(reward, 3).total.isnan().all()
    with pytest.raises(ValueError, match=r"none for 4 pictures in a row.*HTTP 500.*out of memory"):
        score(reward)
    assert len(server.requests) <= 5  # the last may have been on its way
    stopped.set()
    assert score(reward, 3).total.isnan().all()  # who goes on regardless has as many again


def test_a_verdict_in_between_starts_the_count_anew(serve):
    def answer(asked, number):
        return says("Final Score: 3") if "prompt 2" in asked.text else (500, {})

    reward = make(serve(answer), stop_after=4, retries=0)
    assert score(reward, 5).total.isnan().sum() == 4
    with pytest.raises(ValueError, match="4 pictures in a row"):
        score(reward)


def test_a_run_that_stops_does_not_wait_for_what_waits(serve):
    server = serve(lambda asked, number: (400 if "prompt 0" in asked.text else 503, {}))
    reward = make(server, stop_after=1, retries=5, backoff_s=30.0)
    started = time.monotonic()
    with pytest.raises(ValueError, match="HTTP 400"):
        score(reward)
    assert time.monotonic() - started < 2


def test_a_server_that_is_not_there_is_told_at_load():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        with pytest.raises(ValueError, match=r"server at http.*ConnectionRefused.*vllm serve"):
            make(url).load()


def test_a_model_that_is_not_served_is_told_at_load(serve):
    with pytest.raises(ValueError, match=r"serve the model absent, got \['judge', 'other'\]"):
        RemoteReward(serve().url, "absent", QUESTION).load()


@pytest.mark.parametrize("reply", [{"data": None}, {}, [], {"data": [{}]}, b"hello"])
def test_another_kind_of_server_is_told_at_load(serve, monkeypatch, reply):
    monkeypatch.setattr(Handler, "do_GET", lambda self: self.reply(200, reply))
    with pytest.raises(ValueError, match="expected an OpenAI-compatible server"):
        make(serve()).load()


def test_a_server_is_looked_for_once(serve):
    reward = make(server := serve()).load()
    server.shutdown()
    assert reward.load() is reward


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirects_are_refused(serve, monkeypatch, status):
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    other = serve()

    def redirect(handler):
        handler.reply(status, b"", Location=f"{other.url}/chat/completions")

    server = serve(lambda asked, number: redirect)
    reward = make(server, api_key_variable="JUDGE_KEY")
    assert "not followed" in failures(score(reward, 1))[0]
    assert len(server.requests) == 1 and other.requests == []
    monkeypatch.setattr(Handler, "do_GET", redirect)
    with pytest.raises(ValueError, match="not followed; set url"):
        reward.load()


def test_the_key_is_sent_and_never_shown(serve, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    server = serve(lambda asked, number: (401, {"message": f"wrong key {SECRET}"}))
    reward = make(server, api_key_variable="JUDGE_KEY", stop_after=2)
    scores = score(reward, 1)
    assert server.requests[0][1]["Authorization"] == f"Bearer {SECRET}"
    with pytest.raises(ValueError, match="wrong key") as told:
        score(reward, 1)
    held = [vars(reward), vars(reward._server), reward, scores, str(told.value)]
    assert SECRET not in repr(held)
    make(server).score(IMAGES[:1], PROMPTS[:1])
    assert "Authorization" not in server.requests[-1][1]


@pytest.mark.parametrize("key", [SECRET, "EMPTY", "sk-" + "0123456789" * 8])
def test_replies_that_are_no_refusals_do_not_show_the_key_either(serve, monkeypatch, key):
    monkeypatch.setenv("JUDGE_KEY", key)
    silent = {"choices": [{"message": {"x": key}}]}
    replies = [{"error": f"Bearer {key}"}, says(f"key {key}"), silent]
    server = serve(lambda asked, number: replies[number % 3])
    reward = make(server, api_key_variable="JUDGE_KEY", retries=0, concurrency=1)
    told = repr(failures(score(reward)))
    assert "..." in told and key not in told and key[:8] not in told
    monkeypatch.setattr(Handler, "do_GET", lambda self: self.reply(200, {"data": [{"x": key}]}))
    with pytest.raises(ValueError, match="expected an OpenAI-compatible server") as error:
        reward.load()
    assert key not in str(error.value)


@pytest.mark.parametrize("key", ["", "two\nlines", "a b", "schlüssel"])
def test_keys_that_cannot_be_sent_are_told_without_showing_them(monkeypatch, key):
    monkeypatch.setenv("JUDGE_KEY", key)
    with pytest.raises(ValueError, match="environment variable JUDGE_KEY") as told:
        make("http://localhost/v1", api_key_variable="JUDGE_KEY")
    assert not key or key not in str(told.value)


class Waits(Reward):
    """Scores once the remote judge was asked."""

    def __init__(self, asked):
        super().__init__()
        self.asked = asked

    def score(self, images, prompts):
        assert self.asked.wait(5)
        return Scores.single("waits", torch.ones(len(images)))


def test_an_ensemble_asks_it_beside_its_local_members(serve):
    asked = threading.Event()

    def answer(question, number):
        asked.set()
        return says("Final Score: 3")

    ensemble = Ensemble({"local": Waits(asked), "judge": make(serve(answer))}).load()
    scores = ensemble.score(IMAGES, PROMPTS)
    assert scores.total.tolist() == [4.0] * 6 and scores.details[0]["judge"]["answer"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"question": "Is it good?"}, "{prompt} in question"),
        ({"reading": "logits"}, "reading to be one of"),
        ({"pattern": "Score: [1-5]"}, "one group in pattern"),
        ({"pattern": "(a)(b)"}, "one group in pattern"),
        ({"pattern": "("}, "expected a regular expression"),
        ({"lowest": 5.0}, "lowest below highest"),
        ({"highest": math.inf}, "lowest below highest"),
        ({"timeout_s": 0.0}, "timeout_s above 0"),
        ({"backoff_s": -1.0}, "backoff_s from 0 to 60"),
        ({"retries": -1}, "retries of 0 or more"),
        ({"concurrency": 0}, "concurrency of 1 or more"),
        ({"stop_after": 0}, "stop_after of 1 or more"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make("http://localhost/v1", **settings)


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000/v1",
        "file:///etc/passwd",
        "ftp://localhost/v1",
        "http:///v1",
        "http://user:password@localhost/v1",
        "http://localhost/v1?key=1",
        "http://localhost:99999/v1",
        "http://localhost/v1\n",
        "http://a..b/v1",
    ],
)
def test_only_plain_http_addresses_are_taken(url):
    with pytest.raises(ValueError, match=r"url: expected http://HOST:PORT/v1") as told:
        make(url)
    assert "password" not in str(told.value)


def test_pictures_and_prompts_must_be_as_many():
    with pytest.raises(ValueError, match="expected 2 pictures, one a prompt, got 3"):
        make("http://localhost/v1").score(IMAGES[:3], PROMPTS[:2])


def test_no_pictures_have_no_scores():
    assert make("http://localhost/v1").score(IMAGES[:0], []).total.shape == (0,)


def test_the_shipped_piece_asks_for_a_score_from_1_to_5(repository, serve):
    piece = yaml.safe_load((repository / "configs/rewards/remote.yaml").read_text())
    server = serve(lambda asked, number: says("Final Score: 4"))
    settings = piece["init_args"] | {"url": server.url, "model": "judge"}
    reward = RemoteReward(**settings).load()
    scores = score(reward, 1)
    assert scores.parts[settings["name"]].tolist() == [4.0] and reward.device == "remote"
    assert Asked(server.requests[0][2]).text.endswith("\nText Caption: [prompt 0]")
