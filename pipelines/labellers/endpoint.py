"""Calls to an OpenAI-compatible endpoint: many at a time, retried, within a budget, each kept as soon as it succeeds.

Nothing here knows judges. The key is sent in one header and is nowhere else: what a server echoes of it is struck out.
Redirects are not followed, for they would take the key elsewhere; proxies and netrc are not read.
"""

import asyncio
import email.utils
import logging
import math
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import orjson

from pipelines.labellers.cache import Cache
from schemas.errors import Reject, UsageError, UserError

log = logging.getLogger(__name__)

MAX_BYTES = 4 << 20  # of one answer; what is longer is not read further
PROGRESS = 5.0  # seconds between two lines of progress
_AGAIN = frozenset([408, 409, 425, 429])  # and 5xx
_HOPELESS = {
    401: "the key is missing or wrong",
    402: "the account has no credit",
    403: "the key may not use this",
    404: "there is no such model, or base_url is not an OpenAI-compatible API",
}
_LONGEST_BACKOFF, _LONGEST_WAIT = 30.0, 600.0  # seconds: our own, and the longest that a server may ask for
_BYTES_PER_TOKEN = 4  # for costs that no server has told yet

Body = dict[str, Any]  # what POST /chat/completions is sent
Token = tuple[bytes, list[tuple[str, float]]]  # a token's bytes, and (token, log-prob) of the likeliest at its place


@dataclass(frozen=True)
class Reply:
    """The first choice of an answer."""

    text: str
    tokens: list[Token] | None = None  # where log-probs were asked for
    used: tuple[int, int] | None = None  # tokens in and out


Keep = Callable[[int, Reply], None]  # called with a reply and its place, before it is given
Known = Callable[[int], Any]  # called with a place right before its call: an answer that is there by now, or None


class _Failed(Exception):  # noqa: N818 - one attempt's outcome
    def __init__(self, words: str, *, again: bool, after: float | None = None):
        super().__init__(words)
        self.again, self.after = again, after


@dataclass
class Meter:
    """Counts calls, tokens and USD, and holds them within a budget over all processes that share the cache.

    A call's cost is reserved before it (its bytes / 4 and `max_tokens` of the answer) and corrected after it, so calls
    in flight cannot exceed the budget together. Every request counts as a call, one that is retried too.
    """

    cache: Cache
    run: str  # the name under which spending adds up
    price_in: float = 0.0  # USD for 1M tokens
    price_out: float = 0.0
    usd: float | None = None
    calls: int | None = None
    asked: int = 0
    failed: int = 0
    tokens: list[int] = field(default_factory=lambda: [0, 0])
    spent: float = 0.0  # by calls that are over
    _open: int = 0
    _over: bool = False

    async def take(self, body: Body, size: int) -> float:
        """Reserve one call and give the USD that were reserved; `Reject` when the budget does not allow it."""
        cost = self._cost(size / _BYTES_PER_TOKEN, body.get("max_tokens") or body.get("max_completion_tokens") or 0)
        while not self._over:
            if self._reserved(cost):
                self._open, self.asked = self._open + 1, self.asked + 1
                return cost
            if not self._open:
                self._over = True
                log.warning("%s is spent: no further calls", self._limit())
            else:
                await asyncio.sleep(0.02)  # what is in flight may cost less than was reserved for it
        raise Reject("budget_spent", self._limit())

    def _reserved(self, cost: float) -> bool:
        """Whether one more call is within the budget, which then has it."""
        calls, usd = self.cache.spent(self.run)
        if not self._allows(calls + 1, usd + cost):
            return False
        if self._allows(*self.cache.spend(self.run, 1, cost)):
            return True
        self.cache.spend(self.run, -1, -cost)  # another process was faster
        return False

    def settle(self, reserved: float, used: tuple[int, int] | None, billed: bool = True) -> None:
        """A call is over: correct what was reserved, where the answer says what it used, or was none."""
        self._open -= 1
        cost = self._cost(*used) if used else reserved if billed else 0.0
        self.spent += cost
        self.cache.spend(self.run, 0, cost - reserved)
        for i, n in enumerate(used or ()):
            self.tokens[i] += n

    def _cost(self, tokens_in: float, tokens_out: float) -> float:
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6

    def _allows(self, calls: int, usd: float) -> bool:
        # a trillionth of a dollar for sums of floats
        return (self.calls is None or calls <= self.calls) and (self.usd is None or usd <= self.usd + 1e-12)

    def _limit(self) -> str:
        limits = [] if self.usd is None else [f"{self.usd:g} USD"]
        limits += [] if self.calls is None else [f"{self.calls} calls"]
        return f"the budget of {' and '.join(limits)}"


class Endpoint:
    """One worker's client: `concurrency` calls at a time over as many kept connections."""

    def __init__(self, url: str, key: str, meter: Meter, *, concurrency: int, retries: int, timeout: float):
        self._url, self._key, self.meter = checked(url), key, meter
        self._concurrency, self._retries, self._timeout = concurrency, retries, timeout
        self._not_before = 0.0  # monotonic seconds; a server that asked for a pause is given it by all calls
        self._failures, self._succeeded = 0, False
        self._stopped: UserError | None = None

    def ask(self, bodies: Sequence[Body], keep: Keep, known: Known) -> Iterator[tuple[int, Any]]:
        """(place, reply) of every body in the order of arrival; `keep` is called at once, before the reply is given.

        What `known` gives in place of None is given as it is, without a call.

        `UserError` when no further call can succeed. Calls in flight are dropped when the caller stops early.
        """
        if self._stopped:
            raise self._stopped
        if not bodies:
            return
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        loop = asyncio.new_event_loop()
        task = loop.create_task(self._all(bodies, keep, known, answers.put))
        thread = threading.Thread(target=_drive, args=(loop, task), daemon=True)
        thread.start()
        try:
            while (answer := answers.get()) is not None:
                if isinstance(answer, Exception):
                    raise answer
                yield answer
        finally:
            with suppress(RuntimeError):  # the loop is closed: all is done
                loop.call_soon_threadsafe(task.cancel)
            thread.join()

    async def _all(self, bodies: Sequence[Body], keep: Keep, known: Known, put: Callable[[Any], None]) -> None:
        todo, done, start = iter(enumerate(bodies)), [0], time.monotonic()

        async def work() -> None:
            for i, body in todo:
                if (answer := known(i)) is None:
                    answer = await self._call(session, body)
                if isinstance(answer, Reply):
                    keep(i, answer)
                put((i, answer))
                done[0] += 1

        async def tell() -> None:
            while True:
                await asyncio.sleep(PROGRESS)
                self._say(done[0], len(bodies), time.monotonic() - start)

        telling = asyncio.create_task(tell())
        try:
            async with self._session() as session, asyncio.TaskGroup() as workers:
                for _ in range(min(self._concurrency, len(bodies))):
                    workers.create_task(work())
            if time.monotonic() - start > PROGRESS:
                self._say(done[0], len(bodies), time.monotonic() - start)
            put(None)
        except* Exception as errors:
            first = min(errors.exceptions, key=lambda error: not isinstance(error, UserError))
            self._stopped = first if isinstance(first, UserError) else None
            put(first)
        finally:
            telling.cancel()

    def _session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._concurrency),
            timeout=aiohttp.ClientTimeout(total=self._timeout, sock_connect=min(10.0, self._timeout)),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=_headers(self._key),
        )

    async def _call(self, session: aiohttp.ClientSession, body: Body) -> Reply | Reject:
        """One answer, after as many attempts as it takes and is allowed."""
        data = orjson.dumps(body)
        failure, attempt = _Failed("", again=True), 0
        for attempt in range(self._retries + 1):
            await asyncio.sleep(max(0.0, self._not_before - time.monotonic()))
            try:
                reserved = await self.meter.take(body, len(data))
            except Reject as no:
                return no
            try:
                reply = await self._attempt(session, data, reserved)
            except _Failed as failed:
                failure = failed
                self.meter.failed += 1
            else:
                self._failures, self._succeeded = 0, True
                return reply
            if not failure.again:
                break
            if attempt < self._retries:
                await asyncio.sleep(self._backoff(attempt, failure.after))
        self._count_failure(failure)
        return Reject("labeller_failed", f"{failure} (after {attempt + 1} calls)" if attempt else str(failure))

    def _backoff(self, attempt: int, after: float | None) -> float:
        """Seconds: exponential with full jitter; never before the time the server gave, and then spread over 10 %."""
        if after is not None:
            self._not_before = max(self._not_before, time.monotonic() + after)
            return after * (1 + random.random() / 10)
        return random.uniform(0, min(_LONGEST_BACKOFF, 0.5 * 2**attempt))

    def _count_failure(self, failure: _Failed) -> None:
        """Stop the run when nothing works any more, rather than wait for every row to fail in its turn."""
        self._failures += 1
        many = max(20, 2 * self._concurrency)
        if self._failures >= many and (failure.again or not self._succeeded):
            raise UserError(
                f"{self._url}: the last {self._failures} calls failed, the last one with: {failure}; see to the server "
                "and run again: what was answered is kept in the cache"
            )

    async def _attempt(self, session: aiohttp.ClientSession, data: bytes, reserved: float) -> Reply:
        """One request. The reservation is settled whatever comes; `_Failed`, or `UserError` for what ends the run."""
        used, billed = None, True  # a call that was cut off may have been billed
        try:
            async with session.post(f"{self._url}/chat/completions", data=data, allow_redirects=False) as response:
                billed = response.status == 200
                content = _struck(await _read(response), self._key)
                if response.status != 200:
                    raise self._failure(response, content)
            reply = _reply(content)
            used = reply.used
            return reply
        except TimeoutError:
            raise _Failed(f"no answer within {self._timeout:g} s", again=True) from None
        except (aiohttp.ClientError, OSError) as error:
            billed = billed and not isinstance(error, aiohttp.ClientConnectorError)
            raise _Failed(_words(error, self._key), again=True) from None
        finally:
            self.meter.settle(reserved, used, billed)

    def _failure(self, response: aiohttp.ClientResponse, content: bytes) -> Exception:
        said = f"HTTP {response.status}: {_message(content)}"
        if why := _HOPELESS.get(response.status):
            return UserError(f"{self._url}: {why} ({said})")
        after = _retry_after(response.headers.get("Retry-After"))
        if after is not None and after > _LONGEST_WAIT:
            return _Failed(f"{said}; it asks to wait {after:.0f} s", again=False)
        return _Failed(said, again=response.status in _AGAIN or response.status >= 500, after=after)

    def _say(self, done: int, total: int, seconds: float) -> None:
        """One line: of the answers wanted now, how many are there; then what this worker has used since it began."""
        meter = self.meter
        log.info(
            "%d of %d answers (%.1f/s); in all %d calls, %d failed, %d + %d tokens, %.4f USD",
            *(done, total, done / seconds, meter.asked, meter.failed, *meter.tokens, meter.spent),
        )


def _drive(loop: asyncio.AbstractEventLoop, task: "asyncio.Task[None]") -> None:
    with suppress(asyncio.CancelledError):
        loop.run_until_complete(task)
    loop.close()


def _struck(content: bytes, key: str) -> bytes:
    return content.replace(key.encode(), b"***") if key else content


def _words(error: BaseException, key: str) -> str:
    return _struck(f"{type(error).__name__}: {error}".encode(), key)[:300].decode("utf-8", "replace")


def _headers(key: str) -> dict[str, str]:
    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
    return {**headers, "Authorization": f"Bearer {key}"} if key else headers


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """The body, of which no more than `MAX_BYTES` are ever held."""
    content = bytearray()
    async for part in response.content.iter_any():
        content += part
        if len(content) > MAX_BYTES:
            response.close()
            raise _Failed(f"an answer of more than {MAX_BYTES >> 20} MB", again=True)
    return bytes(content)


def _reply(content: bytes) -> Reply:
    """The first choice, if the answer is a chat completion; a null content is an empty text."""
    try:
        answer = orjson.loads(content)
        choice = answer["choices"][0]
        text = choice["message"]["content"]
        if not isinstance(text, str | None):
            raise TypeError(text)
        return Reply(text or "", _tokens(choice), _used(answer))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        shown = content[:100].decode("utf-8", "replace")
        failure = f"the answer of {len(content)} bytes is no chat completion: {shown!r}"
        raise _Failed(failure, again=True) from None


def _tokens(choice: dict[str, Any]) -> list[Token] | None:
    found = (choice.get("logprobs") or {}).get("content")
    return found and [
        (
            bytes(token["token"].encode() if token.get("bytes") is None else token["bytes"]),
            [(str(one["token"]), float(one["logprob"])) for one in token["top_logprobs"]],
        )
        for token in found
    ]


def _used(answer: dict[str, Any]) -> tuple[int, int] | None:
    """Tokens in and out, where the server counts them."""
    usage = answer.get("usage")
    if not usage:
        return None
    used = usage["prompt_tokens"], usage.get("completion_tokens") or 0
    if not all(type(n) is int and n >= 0 for n in used):
        raise TypeError(used)
    return used


def _message(content: bytes) -> str:
    """What an error's body says, in a line: its `message` where it has one."""
    try:
        found: Any = orjson.loads(content)
        found = found.get("error", found)
        text = str(found["message"] if isinstance(found, dict) else found)
    except (ValueError, KeyError, AttributeError):
        text = content[:300].decode("utf-8", "replace")
    return " ".join(text.split())[:300] or "no message"


def _retry_after(header: str | None) -> float | None:
    """Seconds, from a number or an HTTP date; None for anything else."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


# --- before the run ----------------------------------------------------------------------------


def checked(url: str) -> str:
    """The base URL without its last slash; `UsageError` when it is none, or holds a secret."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise UsageError(f"base_url: {url!r} is no address such as http://localhost:8000/v1")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UsageError("base_url: holds a user, a password or a query; give the key by key_env, and the bare address")
    return url.rstrip("/")


def probe(url: str, key: str, model: str, timeout: float = 10.0) -> None:
    """`UserError` when no server is there or it does not take the key; a server need not list its models."""

    async def get() -> tuple[int, bytes]:
        timed = aiohttp.ClientTimeout(total=timeout)
        async with (
            aiohttp.ClientSession(timeout=timed, headers=_headers(key)) as session,
            session.get(f"{url}/models", allow_redirects=False) as response,
        ):
            return response.status, await _read(response)

    try:
        with ThreadPoolExecutor(1) as one:  # the caller may have an event loop of its own
            status, content = one.submit(asyncio.run, get()).result()
    except _Failed:
        return
    except (aiohttp.ClientError, OSError) as error:
        raise UserError(f"{url}: no server answers ({_words(error, key)}); start it, or mend base_url") from None
    if status in (401, 402, 403):
        said = _message(_struck(content, key))
        raise UserError(f"{url}: {_HOPELESS[status]} (HTTP {status}: {said}); the key is read from key_env's variable")
    with suppress(ValueError, KeyError, TypeError, AttributeError):
        names = [one["id"] for one in orjson.loads(content)["data"]]
        if status == 200 and names and model not in names:
            log.warning("%s: does not list a model %r; it lists %s", url, model, ", ".join(map(str, names[:10])))
