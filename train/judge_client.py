"""How the judge talks to an OpenAI-compatible server: patiently, within a deadline, and never giving away the key.

What is asked, and what is made of the answers, stands in `llm_as_a_judge.py`.
"""

import asyncio
import ipaddress
import json
import math
import os
import random
import re
import sys
import time
from collections.abc import Awaitable, Callable
from email.utils import parsedate_to_datetime
from typing import NamedTuple
from urllib.parse import urlsplit

from tqdm import tqdm

MAX_TRIES = 6
FIRST_BACKOFF = 0.5  # seconds, doubled with every try
RETRY_STATUSES = {408, 409, 429}  # and every 5xx
STOP_STATUSES = {401: "wrong key", 402: "no credit", 403: "no right to this model", 404: "no such model or address"}
# Fields of a request that some servers refuse, and the name under which they are sent instead; None: not at all.
OPTIONAL_FIELDS = {"response_format": None, "temperature": None, "max_tokens": "max_completion_tokens"}
INTERRUPTED = "insufficient_system_resource"  # how DeepSeek ends a reply that it is too busy to finish
MAX_ERRORS_IN_A_ROW = 10  # beyond the requests that were open together
# One company's key is not shown to the other; any other server gets whichever is set.
KEYS_OF_HOST = {"api.deepseek.com": ["DEEPSEEK_API_KEY"], "api.openai.com": ["OPENAI_API_KEY"]}


class JudgeError(Exception):
    """The run cannot go on; the message never holds the key. A script ends with `exit_code`."""

    def __init__(self, message: str, exit_code: int = 8) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Reply(NamedTuple):
    """What a chat completion says; `content` is empty where there is none."""

    content: str
    refusal: str | None
    finish_reason: str | None


def find_key(base_url: str, key_from_flag: str | None = None, allow_http: bool = False) -> str:
    """Return the API key for an address, from the flag or the environment, stripped; a local server may do without.

    Raises:
        JudgeError: no key or a malformed one, a malformed address, or one that would show the key on its way.
    """
    try:
        parts = urlsplit(base_url)
    except ValueError:
        parts = urlsplit("")
    host = parts.hostname
    if parts.scheme not in ("http", "https") or not host or "@" in parts.netloc:
        raise JudgeError(f"--judge_base_url {base_url!r} is not an address like https://api.deepseek.com", exit_code=2)
    if parts.scheme == "http" and not (allow_http or _is_loopback(host)):
        raise JudgeError(f"--judge_base_url {base_url!r} would send the key unencrypted; use https", exit_code=2)
    names = KEYS_OF_HOST.get(host, ["DEEPSEEK_API_KEY", "OPENAI_API_KEY"])
    key = (key_from_flag or next(filter(None, map(os.environ.get, names)), "")).strip()
    if not key and _is_loopback(host):
        return "no-key"
    if not re.fullmatch(r"[!-~]+", key):
        fault = "holds a space or a character that is not ASCII" if key else "is missing"
        raise JudgeError(f"the API key for {host} {fault}; set {' or '.join(names)}", exit_code=2)
    return key


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class JudgeClient:
    """One run's requests: the connection, the pause that all of them share, and the tokens they used.

    Args:
        deadline: seconds that an item may take, all its requests and waits together.
        concurrency: how many items are asked for at a time.
    """

    def __init__(self, key: str, base_url: str, deadline: float, concurrency: int) -> None:
        self.key, self.base_url, self.deadline, self.concurrency = key, base_url, deadline, concurrency
        # The key as it is, or with characters escaped as in JSON or in an address.
        written = (rf"(?:\\{{0,4}}{re.escape(c)}|\\{{1,4}}u00{ord(c):02x}|%{ord(c):02x})" for c in key)
        self.key_pattern = re.compile("".join(written), re.IGNORECASE)
        self.resume_at = 0.0  # on the monotonic clock: no request starts earlier
        self.errors_in_a_row = 0
        self.refused_fields: set[str] = set()
        self.used = {"requests": 0, "prompt_tokens": 0, "completion_tokens": 0}

    async def ask_all(self, jobs: dict[str, Callable[[], Awaitable[dict]]], keep: Callable[[str, dict], None]) -> None:
        """Run each job, which calls `complete` and returns an answer, and hand its answer to `keep` as it arrives.

        The first job runs alone, so that a wrong key costs one request. An item that fails gets the status "error".
        """
        import openai  # here, since a dry run and a fully cached run need no client

        # A redirect would hand the key to another address; a proxy could read it in plain http.
        safe = {"follow_redirects": False, "trust_env": self.base_url.startswith("https")}
        self.connection = openai.AsyncOpenAI(
            api_key=self.key,
            base_url=self.base_url,
            timeout=self.deadline,
            max_retries=0,  # `complete` retries: the pause is shared, and waiting counts against the deadline
            http_client=openai.DefaultAsyncHttpxClient(**safe),
        )
        items = iter(jobs.items())
        with tqdm(total=len(jobs), desc="judge", unit="item", disable=None) as bar:

            async def work(most: float = math.inf) -> None:
                while most > 0 and (item := next(items, None)):
                    most -= 1
                    key, job = item
                    keep(key, await self._answer(job))
                    bar.update()

            async with self.connection:
                await work(most=1)
                await asyncio.gather(*(work() for _ in range(self.concurrency)))

    async def _answer(self, job: Callable[[], Awaitable[dict]]) -> dict:
        await self._wait_out_pause()  # a pause before its first request does not count against an item
        try:
            async with asyncio.timeout(self.deadline):
                answer = await job()
        except TimeoutError:
            answer = {"status": "error", "reason": f"no answer within {self.deadline:g} s"}
        except ConnectionError as error:
            answer = {"status": "error", "reason": str(error)}
        # All that a server says passes here, and it may echo the key.
        answer["reason"] = self.key_pattern.sub("[key]", answer["reason"])[:300]
        self.errors_in_a_row = self.errors_in_a_row + 1 if answer["status"] == "error" else 0
        if self.errors_in_a_row >= MAX_ERRORS_IN_A_ROW + self.concurrency:
            raise JudgeError(f"{self.errors_in_a_row} items in a row got no answer, the last: {answer['reason']!r}")
        return answer

    async def complete(self, request: dict) -> Reply:
        """Send the body of a chat completion request until it is answered.

        Of `OPTIONAL_FIELDS` those that the server says it does not take are left out, here and from then on.

        Raises:
            ConnectionError: this request gets no answer.
            JudgeError: no request would.
        """
        import openai

        for attempt in range(MAX_TRIES):
            await self._wait_out_pause()
            self.used["requests"] += 1
            status, asked_wait = 0, 0.0
            sent = {OPTIONAL_FIELDS[n] if n in self.refused_fields else n: value for n, value in request.items()}
            sent.pop(None, None)
            try:
                response = await self.connection.chat.completions.with_raw_response.create(**sent)
                return self._read(response.http_response.text)
            except openai.APIStatusError as error:
                status, problem = error.status_code, f"HTTP {error.status_code}: {_complaint(error.body)}"
                asked_wait = retry_after(error.response.headers.get("retry-after"))
            except openai.APIConnectionError:
                problem = "no connection"
            except ValueError as error:
                problem = str(error)
            # Raised out here, an error does not carry the server's reply along as its context.
            self._stop_if_hopeless(status, asked_wait)
            if status in (400, 422) and self._refuses_fields(sent, problem):
                continue
            if 400 <= status < 500 and status not in RETRY_STATUSES:
                raise ConnectionError(problem)
            wait = asked_wait + FIRST_BACKOFF * 2**attempt * random.uniform(0.5, 1)
            if status == 429:
                self.resume_at = max(self.resume_at, time.monotonic() + wait)
            else:
                await asyncio.sleep(wait)
        raise ConnectionError(f"{problem} ({MAX_TRIES} tries)")

    def _stop_if_hopeless(self, status: int, asked_wait: float) -> None:
        advice = STOP_STATUSES.get(status)
        if 300 <= status < 400:
            advice = "it redirects elsewhere, and the key is not sent there; give the final address"
        elif asked_wait > self.deadline:
            advice = f"it asks for {asked_wait:.0f} s of silence; run again after that"
        if advice:
            raise JudgeError(f"{self.base_url} answers HTTP {status}: {advice}")

    def _refuses_fields(self, sent: dict, problem: str) -> bool:
        """Whether the server's complaint names, in quotes, optional fields that it was sent; they are remembered."""
        named = {name for name in OPTIONAL_FIELDS if name in sent and re.search(rf"['\"`]{name}\b", problem)}
        for name in sorted(named - self.refused_fields):
            tqdm.write(f"note: the server does not take `{name}`; it is asked without", file=sys.stderr)
        self.refused_fields |= named
        return bool(named)

    async def _wait_out_pause(self) -> None:
        while (left := self.resume_at - time.monotonic()) > 0:
            await asyncio.sleep(left)

    def _read(self, body: str) -> Reply:
        try:
            completion = json.loads(body)
            choice, usage = completion["choices"][0], completion.get("usage") or {}
            message = choice["message"]
            for name in ("prompt_tokens", "completion_tokens"):
                self.used[name] += int(usage.get(name) or 0)
            content = message.get("content")
            content = content if isinstance(content, str) else ""
            reply = Reply(content, message.get("refusal"), choice.get("finish_reason"))
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            raise ValueError("the reply is not a chat completion") from None
        if reply.finish_reason == INTERRUPTED:
            raise ValueError("the server broke the reply off")
        return reply


def _complaint(body: object) -> str:
    """What the body of an HTTP error says, decoded as far as it is JSON."""
    message = body.get("message") if isinstance(body, dict) else body
    return message if isinstance(message, str) else json.dumps(body, ensure_ascii=False)


def retry_after(header: str | None) -> float:
    """Return the seconds that a Retry-After header asks for, as a number or an HTTP date; 0 for anything else."""
    for read in (float, lambda date: parsedate_to_datetime(date).timestamp() - time.time()):
        try:
            seconds = read(header)
        except (TypeError, ValueError, OverflowError):
            continue
        return seconds if 0 < seconds < math.inf else 0.0
    return 0.0
