"""A judge behind a server that speaks OpenAI's chat completions, as vLLM and SGLang do.

For judges too large to sit beside the policy. The server is asked over plain HTTP, each picture in
a request of its own, as a PNG in a data URL (https://platform.openai.com/docs/api-reference/chat).
A picture without a usable answer has no verdict. Many of them in a row stop the run; a share of
them does by the `most_missing` of whoever asks for scores.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import math
import os
import random
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, Literal, Self
from urllib.parse import quote, urlsplit

import torch
from PIL import Image
from torch import Tensor

from cotgen_pl.interfaces import Prompt, Reward, Scores, check_choice, check_positive
from cotgen_pl.pixels import as_rgb, to_pillow

Reading = Literal["number", "yes_probability"]
Reply = tuple[int, Mapping[str, str], bytes]  # status, headers, body
Verdict = tuple[float, dict[str, Any]]  # a score, NaN for none, and its details
CONNECTIONS = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
LARGEST_REPLY = 2**22  # bytes; an answer of 1,000 tokens with their alternatives has 2 MB
LONGEST_WAIT_S = 60.0  # before asking again; a server that wants more rest is not there
NUM_ALTERNATIVES = 20  # first words with their probabilities; OpenAI's own limit, vLLM's default
LONGEST_REASON = 500  # characters of why there is no verdict; a reply may be quoted in it
LEAST_YES_OR_NO = 0.1  # a judge that begins in another way nine times of ten is not answering


class NoVerdictError(Exception):
    """Why a picture has no verdict, where asking again would not help."""


class PassingError(NoVerdictError):
    """Why a picture has no verdict yet; asking again, not before `wait_s` seconds, may help."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class Server:
    """An OpenAI-compatible server: JSON there and back, no redirects, no connection kept.

    Args:
        url: Up to and with `/v1`.
        timeout_s: Seconds to connect, and again for the whole answer.
        api_key_variable: The environment variable that holds the key. The key itself is read for
            each request, kept nowhere, and taken out of what errors quote.
    """

    def __init__(self, url: str, timeout_s: float, api_key_variable: str | None) -> None:
        self.scheme, self.host, self.port, self.path = _split_url(url)
        self.timeout_s, self.api_key_variable = timeout_s, api_key_variable
        self._read_key()

    def exchange(self, method: str, path: str, content: Any = None) -> Any:
        """The JSON that the server answers with; a NoVerdictError where there is none."""
        body = None if content is None else json.dumps(content).encode()
        status, headers, reply = self._send(method, self.path + path, body)
        if status != http.client.OK:
            raise self._refusal(status, headers, reply)
        if len(reply) > LARGEST_REPLY:
            raise NoVerdictError(f"a reply of more than {LARGEST_REPLY} bytes")
        try:
            return json.loads(reply)
        except (ValueError, RecursionError) as error:
            raise PassingError(f"a reply that is no JSON: {self._quote(reply)}") from error

    def _send(self, method: str, path: str, body: bytes | None) -> Reply:
        connection = CONNECTIONS[self.scheme](self.host, self.port, timeout=self.timeout_s)
        started = time.monotonic()
        try:
            connection.connect()
            with _cut_after(connection.sock, self.timeout_s):
                connection.request(method, path, body, self._headers())
                response = connection.getresponse()
                return response.status, response.headers, response.read(LARGEST_REPLY + 1)
        except (OSError, http.client.HTTPException) as error:
            late = time.monotonic() - started >= self.timeout_s
            reason = f"within {self.timeout_s} s" if late else f"but {error!r}"
            raise PassingError(f"no answer {reason}") from error
        finally:
            connection.close()

    def _headers(self) -> dict[str, str]:
        key = self._read_key()
        headers = {"Content-Type": "application/json"}
        return headers | {"Authorization": f"Bearer {key}"} if key else headers

    def _read_key(self) -> str | None:
        if self.api_key_variable is None:
            return None
        key = os.environ.get(self.api_key_variable, "")
        if not re.fullmatch(r"[!-~]+", key):
            raise ValueError(
                "expected an API key without spaces in the environment variable "
                f"{self.api_key_variable}, got {'another' if key else 'none'}; export one"
            )
        return key

    def _refusal(self, status: int, headers: Mapping[str, str], reply: bytes) -> NoVerdictError:
        told = f"HTTP {status} {http.client.responses.get(status, '')}"
        if 300 <= status < 400:
            place = self._quote(headers.get("Location", "").encode())
            return NoVerdictError(f"{told} to {place}, not followed; set url to where it leads")
        told = f"{told}: {self._quote(reply)}"
        if status not in (408, 429) and status < 500:  # the request's own fault
            return NoVerdictError(told)
        rest = headers.get("Retry-After", "")
        wait_s = float(rest) if re.fullmatch(r"\d{1,9}", rest) else 0.0
        if wait_s > LONGEST_WAIT_S:
            return NoVerdictError(f"{told}; asks to wait {wait_s} s")
        return PassingError(told, wait_s)

    def _quote(self, reply: bytes) -> str:
        return repr(self.hide_key(reply[:2000].decode(errors="replace"))[:200])

    def hide_key(self, text: str) -> str:
        """The beginning of a text that may quote a reply, without the API key."""
        key = self._read_key()  # hidden first: the half of one would not be found
        return (text.replace(key, "...") if key else text)[:LONGEST_REASON]


class RemoteReward(Reward):
    """Asks a judge about each picture: `{prompt}` in the question, a score in the answer.

    With `number` the score is the number that `pattern` finds in a greedy answer. With
    `yes_probability` it is p(yes) / (p(yes) + p(no)) among the 20 most probable first tokens, a
    word that is not among them counting as 0: fewer ties, if the server gives `top_logprobs`.

    Args:
        url: Of the server, up to and with `/v1`, like `http://localhost:8000/v1`.
        model: As the server calls it.
        question: Follows the picture; `{prompt}` stands for the prompt.
        reading: How to read the answer.
        pattern: A regular expression with one group, the number; its first match counts. Default:
            the form that UnifiedReward answers in (https://github.com/CodeGoat24/UnifiedReward).
        lowest: Of the judge's scale. A number outside of it is no verdict. UnifiedReward: 1 to 5.
        highest: The same.
        max_tokens: Longest answer that a number is read from.
        concurrency: Most requests at a time, from each process.
        timeout_s: Seconds to connect to the server, and again for its whole answer.
        retries: How often to ask again after no answer, half an answer, HTTP 408, 429 or 5xx.
        backoff_s: Seconds before asking again, doubled each time up to 60, times 0.5 to 1.5 by
            chance, and no less than the server's own Retry-After.
        stop_after: So many pictures in a row without a verdict stop the run.
        api_key_variable: Name of the environment variable that holds the API key.
        name: Of the score among the parts.
    """

    device = "remote"

    def __init__(
        self,
        url: str,
        model: str,
        question: str,
        reading: Reading = "number",
        pattern: str = r"Final Score:\s*(-?\d+(?:\.\d+)?)",
        lowest: float = 1.0,
        highest: float = 5.0,
        max_tokens: int = 512,
        concurrency: int = 16,
        timeout_s: float = 60.0,
        retries: int = 3,
        backoff_s: float = 1.0,
        stop_after: int = 16,
        api_key_variable: str | None = None,
        name: str = "remote",
    ) -> None:
        super().__init__()
        check_choice("reading", reading, Reading)
        check_positive(max_tokens=max_tokens, concurrency=concurrency, stop_after=stop_after)
        _check("{prompt}" in question, "{prompt} in question, where the prompt goes", question)
        _check(0 < timeout_s < math.inf, "timeout_s above 0 seconds", timeout_s)
        _check(0 <= backoff_s <= LONGEST_WAIT_S, "backoff_s from 0 to 60 seconds", backoff_s)
        _check(retries >= 0, "retries of 0 or more", retries)
        scale = lowest, highest
        _check(-math.inf < lowest < highest < math.inf, "lowest below highest, finite", scale)
        self.name, self.url, self.model, self.question = name, url, model, question
        self.pattern, self.scale = _compile(pattern), scale
        self.reading, self.max_tokens, self.stop_after = reading, max_tokens, stop_after
        self.concurrency, self.retries, self.backoff_s = concurrency, retries, backoff_s
        self._server = Server(url, timeout_s, api_key_variable)
        self._jitter = random.Random()  # its own: no other random state moves
        self._failures_in_row, self._found = 0, False

    def load(self) -> Self:
        """See that the server is there and serves the model; a second call does nothing."""
        if not self._found:
            served = self._list_models()
            if self.model not in served:
                raise ValueError(
                    f"reward {self.name}: expected {self.url} to serve the model {self.model}, got "
                    f"{served[:9]}; set model to one of these, or serve it"
                )
            self._found = True
        return self

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Score pictures [B, 1, 3 or 4, H, W] in [0, 1]; details: answers, or why there is none.

        Raises:
            ValueError: `stop_after` pictures in a row, those of earlier calls too, had no verdict.
        """
        _check(len(images) == len(prompts), f"{len(prompts)} pictures, one a prompt", len(images))
        verdicts = self._ask_all(to_pillow(as_rgb(images)), [prompt.text for prompt in prompts])
        values = torch.tensor([v for v, _ in verdicts], dtype=torch.float32, device=images.device)
        return Scores.single(self.name, values, [details for _, details in verdicts])

    def _ask_all(self, pictures: list[Image.Image], texts: list[str]) -> list[Verdict]:
        stop, verdicts = threading.Event(), []
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            for verdict in pool.map(self._ask, pictures, texts, [stop] * len(texts)):
                self._count(verdict)
                verdicts.append(verdict)
            return verdicts
        finally:  # also where the run stops: what waits to ask does not ask any more
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, picture: Image.Image, text: str, stop: threading.Event) -> Verdict:
        content = self._write_request(picture, text)
        failure, wait_s, pause_s = "not asked: the run stops", 0.0, self.backoff_s
        for _ in range(self.retries + 1):
            if stop.wait(wait_s):
                break
            try:
                return self._read(self._server.exchange("POST", "/chat/completions", content))
            except PassingError as error:
                failure = self._server.hide_key(str(error))
                wait_s = max(pause_s * self._jitter.uniform(0.5, 1.5), error.wait_s)
                pause_s = min(2 * pause_s, LONGEST_WAIT_S)
            except NoVerdictError as error:
                return math.nan, {"failure": self._server.hide_key(str(error))}
        return math.nan, {"failure": failure}

    def _write_request(self, picture: Image.Image, text: str) -> dict[str, Any]:
        file = io.BytesIO()
        picture.save(file, "PNG")
        address = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        question = [
            {"type": "image_url", "image_url": {"url": address}},
            {"type": "text", "text": self.question.replace("{prompt}", text)},
        ]
        content = {"model": self.model, "messages": [{"role": "user", "content": question}]}
        if self.reading == "number":
            return content | {"temperature": 0.0, "max_tokens": self.max_tokens}
        # At another temperature some servers give the probabilities after it was applied.
        asked = {"logprobs": True, "top_logprobs": NUM_ALTERNATIVES}
        return content | {"temperature": 1.0, "top_p": 1.0, "max_tokens": 1} | asked

    def _read(self, reply: Any) -> Verdict:
        if self.reading == "number":
            return read_number(reply, self.pattern, *self.scale)
        return read_yes_probability(reply)

    def _count(self, verdict: Verdict) -> None:
        """Stop the run at the last of `stop_after` pictures in a row without a verdict."""
        score, details = verdict
        self._failures_in_row = self._failures_in_row + 1 if math.isnan(score) else 0
        if self._failures_in_row >= self.stop_after:
            self._failures_in_row = 0
            raise ValueError(
                f"reward {self.name}: expected verdicts of {self.model} at {self.url}, got none "
                f"for {self.stop_after} pictures in a row, the last because of "
                f"{details['failure']}; see to server or question, go on with --ckpt_path last"
            )

    def _list_models(self) -> list[str]:
        try:
            return [model["id"] for model in self._server.exchange("GET", "/models")["data"]]
        except (NoVerdictError, KeyError, TypeError) as error:
            raise ValueError(
                f"reward {self.name}: expected an OpenAI-compatible server at {self.url}, got "
                f"{self._server.hide_key(repr(error))}; start it (`vllm serve {self.model}`), set "
                "url to it, ending in /v1"
            ) from error


def read_number(reply: Any, pattern: re.Pattern[str], lowest: float, highest: float) -> Verdict:
    """The number in a chat completion's answer; a NoVerdictError where there is none.

    The pattern's first match counts; a number that is not from lowest to highest is none.
    """
    choice = _first_choice(reply)
    answer = choice["message"].get("content")
    if not isinstance(answer, str):
        raise NoVerdictError(f"an answer without text: {choice['message']}")
    found = pattern.search(answer)
    if found and choice.get("finish_reason") == "length" and found.end() == len(answer):
        raise NoVerdictError(f"an answer cut off at max_tokens, in its number: {found[0]!r}")
    number = math.nan
    with suppress(TypeError, ValueError):  # None where the group is optional, or no number
        number = float(found[1]) if found else math.nan
    if not lowest <= number <= highest:
        scale = f"{pattern.pattern!r} from {lowest} to {highest}"
        raise NoVerdictError(f"an answer without {scale}: {answer!r}")
    return number, {"answer": answer}


def read_yes_probability(reply: Any) -> Verdict:
    """p(yes) / (p(yes) + p(no)) of an answer's first token; a NoVerdictError where there is none.

    Tokens that differ in case or in spaces around them are the same word.
    """
    choice = _first_choice(reply)
    try:
        tokens = choice["logprobs"]["content"][0]["top_logprobs"]
        words = [(t["token"].strip().lower(), math.exp(min(t["logprob"], 0.0))) for t in tokens]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise NoVerdictError(f"no top_logprobs; set reading to number; got {choice}") from error
    shares = {word: sum(p for found, p in words if found == word) for word in ("yes", "no")}
    both = shares["yes"] + shares["no"]
    if not both >= LEAST_YES_OR_NO:  # nor where it is NaN
        raise NoVerdictError(f"an answer that begins with yes or no with probability {both} only")
    return shares["yes"] / both, shares


def _first_choice(reply: Any) -> dict[str, Any]:
    with suppress(KeyError, IndexError, TypeError):
        choice = reply["choices"][0]
        if isinstance(choice["message"], dict):
            return choice
    raise PassingError(f"a reply that is no chat completion: {reply}")


@contextmanager
def _cut_after(connection: socket.socket, seconds: float) -> Iterator[None]:
    """End a connection that is still in use by then, with a TimeoutError.

    A socket's own timeout begins anew with each byte, so a trickle would hold it forever.
    """

    def cut() -> None:
        is_cut.set()
        with suppress(OSError):  # ended already
            socket.socket.shutdown(connection, socket.SHUT_RDWR)  # beneath TLS, which would wait

    is_cut, watch = threading.Event(), threading.Timer(seconds, cut)
    watch.daemon = True
    watch.start()
    try:
        yield
    finally:
        watch.cancel()
    if is_cut.is_set():  # reading the half of an answer raises nothing by itself
        raise TimeoutError


def _split_url(url: str) -> tuple[str, str, int, str]:
    """Scheme, host, port and path, without a slash at the end."""
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        host = (parts.hostname or "").encode("idna").decode()
    except ValueError as error:
        raise ValueError(f"url: expected http://HOST:PORT/v1, got {error}; correct it") from error
    plain = not (parts.query or parts.fragment or "@" in parts.netloc)
    if parts.scheme not in CONNECTIONS or not host or not plain or not url.isprintable():
        raise ValueError(
            "url: expected http://HOST:PORT/v1 or https://..., nothing before the host or behind "
            f"/v1, got scheme {parts.scheme!r}, host {host!r}; name keys by api_key_variable"
        )
    return parts.scheme, host, port, quote(parts.path.rstrip("/"), safe="/%")


def _check(holds: bool, expected: str, got: Any) -> None:
    if not holds:
        raise ValueError(f"expected {expected}, got {got!r}; set it so")


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"pattern: expected a regular expression, got {error}; correct it"
        ) from error
    _check(compiled.groups == 1, "one group in pattern, the number; (?:...) is none", pattern)
    return compiled
