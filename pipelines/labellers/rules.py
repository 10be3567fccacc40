"""Rules: scores that a computation gives, without a model. What they compare with comes from the row's metadata, at a
path such as `answer` or `"my key".tests[0]`, or is a constant.

A rule is a settings class and a function that makes of it a function from an item to a score or `Reject`; `KINDS` names
them. A response that does not hold what the rule looks for scores 0; a row that lacks what it is compared with is
rejected. Rules that cost more than a look into the cache are cached.
"""

import copy
import dataclasses
import hashlib
import importlib
import importlib.util
import json
import math
import numbers
import platform
import re
import sys
import traceback
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import regex

from pipelines.converters.messages import show
from pipelines.labellers import sandbox
from pipelines.labellers.base import Identity, Item, Kind, Labeller, Outcome, Score, cached
from pipelines.labellers.bounded import Bounded
from pipelines.labellers.cache import Cache
from pipelines.mapping.paths import needed, parse
from schemas.command import did_you_mean
from schemas.errors import Reject, UsageError, UserError

Scorer = Callable[[Item], Score]
EXTRACTS = ("whole", "boxed", "hashes", "last-number", "regex")
_SECONDS = 1.0  # for one pattern of the user on one text

# --- what is compared ----------------------------------------------------------------------------


def _text(value: Any, where: str) -> str:
    """A text, or a number or truth value as JSON writes it."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    raise Reject("wrong_type", f"{where} is {show(value)}, not a text or number")


def _answers(item: Item, given: Any) -> list[str]:
    """The constant, or what stands in the metadata; of a list, each element is an answer that counts."""
    found = given.constant if given.constant is not None else needed(dict(item.metadata), given.answer)
    several = found if isinstance(found, list) else [found]
    if not several:
        raise Reject("missing_field", f"{given.answer} is an empty list")
    return [_text(value, given.answer) for value in several]


def _response(item: Item) -> str:
    return item.responses[0]


# --- extraction ----------------------------------------------------------------------------------

# -1,234.5, 7, .5 or 1e-3; or the 4 of (1+2)-4
_NUMBER = re.compile(
    r"(?<![\w.)])[-+−]?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)?(?:\.[0-9]+|(?<=[0-9]))(?:[eE][-+]?[0-9]+)?"
    r"|(?<![\w.])(?:[0-9]+(?:\.[0-9]+)?)"
)
_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)


def boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{…}` whose braces close."""
    open_at: list[int] = []  # where each brace's content starts; -1 for one that is no box
    start, end = -1, -1
    for found in _BRACES.finditer(text):
        if found[0].endswith("{") and found[0] != "\\{":
            open_at.append(found.end() if len(found[0]) > 1 else -1)
        elif found[0] == "}" and open_at and (opened := open_at.pop()) > start:
            start, end = opened, found.start()
    return text[start:end].strip() if start >= 0 else None


def after_hashes(text: str) -> str | None:
    """The rest of the line after the last `####`, as in GSM8K."""
    _, hashes, rest = text.rpartition("####")
    return rest.strip().partition("\n")[0].strip() if hashes else None


def last_number(text: str) -> str | None:
    """The last number, without commas between its digits."""
    found = None
    for found in _NUMBER.finditer(text):  # noqa: B007 - the last one
        pass
    return found and found[0].replace(",", "").replace("−", "-")


def by_pattern(pattern: Any, text: str) -> str | None:
    """The first group of the first match, or the match where there is no group."""
    found = _searched(pattern.search, text)
    return found and (found[1] if pattern.groups else found[0])


def _searched(search: Callable[..., Any], text: str) -> Any:
    try:
        return search(text, timeout=_SECONDS)
    except TimeoutError:
        raise Reject("labeller_failed", f"the pattern took more than {_SECONDS:g} s on {show(text)}") from None


def _extractor(kind: str, pattern: str) -> Callable[[str], str | None]:
    if kind not in EXTRACTS:
        raise UsageError(f"no extraction {kind!r}{did_you_mean(kind, EXTRACTS)}; {', '.join(EXTRACTS)}")
    if kind == "regex":
        return partial(by_pattern, _compiled(pattern))
    by_name: dict[str, Callable[[str], str | None]] = {
        "whole": str,
        "boxed": boxed,
        "hashes": after_hashes,
        "last-number": last_number,
    }
    return by_name[kind]


def _compiled(pattern: Any) -> Any:
    """The pattern compiled; `UsageError` when it is none."""
    if not isinstance(pattern, str) or not pattern:
        raise UsageError(f"the pattern must be a text that is not empty, and it is {show(pattern)}")
    try:
        return regex.compile(pattern)
    except Exception as error:  # regex.error, and what overflowing repetitions raise
        raise UsageError(f"the pattern {pattern[:200]!r} is none: {error}") from None


def _extracted(extract: Callable[[str], str | None], answers: list[str], where: str) -> list[str]:
    found = [extracted for answer in answers if (extracted := extract(answer)) is not None]
    if not found:
        raise Reject("missing_field", f"{where}: nothing to extract in {show(answers[0])}")
    return found


# --- exact match ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExactMatch:
    answer: str = field(default="answer", metadata={"description": "path in the metadata; of a list, any will do"})
    constant: Any = field(default=None, metadata={"description": "the answer itself, instead of a path"})
    extract: str = field(default="whole", metadata={"description": f"from the response: {', '.join(EXTRACTS)}"})
    pattern: str = field(default="", metadata={"description": "of `regex`: its first group, or all of it"})
    extract_answer: str = field(default="whole", metadata={"description": "from the answer, likewise"})
    ignore_case: bool = field(default=False, metadata={"description": "upper and lower case are the same"})
    ignore_space: bool = field(default=False, metadata={"description": "each run of white space is one space"})
    ignore_punctuation: bool = field(default=False, metadata={"description": "punctuation is left out"})


def _exact_match(given: ExactMatch) -> Scorer:
    extract, extract_answer = (_extractor(kind, given.pattern) for kind in (given.extract, given.extract_answer))

    def score(item: Item) -> Score:
        answers = _extracted(extract_answer, _answers(item, given), given.answer)
        found = extract(_response(item))
        hit = found is not None and _normal(found, given) in {_normal(answer, given) for answer in answers}
        return Score(float(hit), {"extracted": found[:200] if found is not None else None})

    return score


def _normal(text: str, given: ExactMatch) -> str:
    if given.ignore_case:
        text = text.casefold()
    if given.ignore_punctuation:
        text = "".join(c for c in text if not unicodedata.category(c).startswith("P"))
    return " ".join(text.split()) if given.ignore_space else text


# --- regex ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Regex:
    pattern: str = field(default="", metadata={"description": "what is looked for, in the syntax of `regex`"})
    answer: str = field(default="", metadata={"description": "path of the pattern in the metadata, instead"})
    full: bool = field(default=False, metadata={"description": "the whole response must match"})


def _regex(given: Regex) -> Scorer:
    if bool(given.pattern) == bool(given.answer):
        raise UsageError("regex: give either pattern=… or answer=… (the path of a pattern in the metadata)")
    fixed = _compiled(given.pattern) if given.pattern else None

    def score(item: Item) -> Score:
        pattern = fixed or _pattern_of(item, given.answer)
        return Score(float(bool(_searched(pattern.fullmatch if given.full else pattern.search, _response(item)))))

    return score


def _pattern_of(item: Item, path: str) -> Any:
    try:
        return _compiled(needed(dict(item.metadata), path))
    except UsageError as error:
        raise Reject("wrong_type", f"{path}: {error}") from None


# --- mathematics ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mathematics:
    answer: str = field(default="answer", metadata={"description": "path in the metadata; of a list, any will do"})
    constant: Any = field(default=None, metadata={"description": "the answer itself, instead of a path"})
    extract: str = field(
        default="auto", metadata={"description": f"auto (math-verify finds it), or as above: {', '.join(EXTRACTS)}"}
    )
    pattern: str = field(default="", metadata={"description": "of `regex`: its first group, or all of it"})
    extract_answer: str = field(default="whole", metadata={"description": "from the answer, but for auto"})
    digits: int = field(default=6, metadata={"description": "decimals that numbers with a point are rounded to"})
    seconds: float = field(default=5.0, metadata={"description": "of computing for one row; more is rejected"})


def _mathematics(given: Mathematics) -> Scorer:
    _installed("math_verify", "rules")
    auto = given.extract == "auto"
    extract = str if auto else _extractor(given.extract, given.pattern)
    extract_answer = _extractor(given.extract_answer, given.pattern)
    equal = Bounded("equal", given.seconds)

    def score(item: Item) -> Score:
        answers = _extracted(extract_answer, _answers(item, given), given.answer)
        found = extract(_response(item))
        if found is None:
            return Score(0.0, {"extracted": None})
        same, answer, read = equal(answers, found, not auto, given.digits)
        if same is None:
            raise Reject("labeller_failed", f"{given.answer} {show(answers[0])} cannot be read as mathematics")
        return Score(float(same), {"extracted": read, "answer": answer})

    return score


def _installed(module: str, extra: str) -> None:
    if not importlib.util.find_spec(module):
        raise UserError(f"{module} is not installed: pip install 'una-align[{extra}]'")


# --- JSON ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JsonSchema:
    schema: str = field(default="", metadata={"description": "path of the schema in the metadata"})
    schema_file: str = field(default="", metadata={"description": "a JSON file with the schema, instead"})
    fenced: bool = field(default=False, metadata={"description": "the last fenced block is meant, if there is one"})
    seconds: float = field(default=5.0, metadata={"description": "of computing for one row; more is rejected"})


def _json_schema(given: JsonSchema) -> Scorer:
    _installed("jsonschema", "rules")
    fixed = _schema_of(given)
    conforms = Bounded("conforms", given.seconds)

    def score(item: Item) -> Score:
        schema = fixed if fixed is not None else needed(dict(item.metadata), given.schema)
        text = _response(item)
        if given.fenced and (blocks := _blocks(text, ("", "json"))):
            text = blocks[-1]
        wrong = conforms(schema, text)
        return Score(float(wrong is None), {"error": wrong} if wrong else {})

    return score


def _schema_of(given: JsonSchema) -> Any:
    if bool(given.schema) == bool(given.schema_file):
        raise UsageError("json-schema: give either schema=… (a path in the metadata) or schema_file=…")
    if not given.schema_file:
        return None
    try:
        schema = json.loads(Path(given.schema_file).read_text("utf-8"))
        Bounded("conforms", given.seconds)(schema, "null")
    except (OSError, ValueError) as error:
        raise UsageError(f"{given.schema_file}: this JSON schema cannot be read ({error})") from None
    except Reject as reject:
        raise UsageError(f"{given.schema_file}: {reject.detail}") from None
    return schema


_FENCE = re.compile(r"^[ \t]*(```+|~~~+)[ \t]*([\w+-]*)[^\n`]*\n(.*?)(?:^[ \t]*\1|\Z)", re.DOTALL | re.MULTILINE)


def _blocks(text: str, languages: Sequence[str]) -> list[str]:
    """The fenced blocks in one of the languages."""
    return [found[3] for found in _FENCE.finditer(text) if found[2].lower() in languages]


# --- length --------------------------------------------------------------------------------------

UNITS: dict[str, Callable[[str], int]] = {"characters": len, "words": lambda text: len(text.split())}


@dataclass(frozen=True)
class Length:
    least: float = field(default=0, metadata={"description": "the shortest that scores 1"})
    most: float = field(default=math.inf, metadata={"description": "the longest that scores 1"})
    unit: str = field(default="characters", metadata={"description": "characters, words or tokens"})
    tokenizer: str = field(default="", metadata={"description": "directory of the tokenizer, for tokens"})
    falloff: float = field(default=0, metadata={"description": "units outside the window over which 1 falls to 0"})


def _length(given: Length) -> Scorer:
    if not 0 <= given.least <= given.most or not 0 <= given.falloff < math.inf or given == Length():
        raise UsageError(f"length: give 0 ≤ least ≤ most and falloff ≥ 0, not {dataclasses.asdict(given)}")
    measure = _measure(given)

    def score(item: Item) -> Score:
        length = measure(_response(item))
        outside = max(given.least - length, length - given.most, 0)
        value = 1.0 if not outside else max(0.0, 1 - outside / given.falloff) if given.falloff else 0.0
        return Score(value, {given.unit: length})

    return score


def _measure(given: Length) -> Callable[[str], int]:
    if (given.unit == "tokens") != bool(given.tokenizer):
        raise UsageError("length: unit=tokens and tokenizer=… go together")
    if given.unit == "tokens":
        tokenizer = _tokenizer(given.tokenizer)
        return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])
    if given.unit not in UNITS:
        raise UsageError(f"length: no unit {given.unit!r}{did_you_mean(given.unit, [*UNITS, 'tokens'])}")
    return UNITS[given.unit]


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # whatever the library raises for a directory that holds none
        raise UserError(f"{name}: the tokenizer cannot be loaded ({type(error).__name__}: {error})") from None


def _length_facts(given: Length) -> dict[str, Any]:
    facts = _settings_of(given, "tokenizer")
    if given.tokenizer:
        backend = getattr(_tokenizer(given.tokenizer), "backend_tokenizer", None)
        facts["tokenizer"] = _hash(backend.to_str()) if backend else given.tokenizer
    return facts | {"most": str(given.most)}  # JSON has no infinity


# --- code ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Code:
    allow_execution: bool = field(default=False, metadata={"description": "must be true: code of a model is run"})
    tests: str = field(
        default="tests",
        metadata={"description": "path in the metadata of Python with asserts, of `{input, output}`, or of a list"},
    )
    block: str = field(default="last", metadata={"description": "first, last or all of the response's Python blocks"})
    all_or_nothing: bool = field(default=False, metadata={"description": "1 only if all tests pass, else their share"})
    seconds: float = field(default=10.0, metadata={"description": "of one test, by the clock"})
    memory: int = field(default=512, metadata={"description": "MiB"})
    disk: int = field(default=16, metadata={"description": "MiB of files, and of output"})
    network: str = field(
        default="none", metadata={"description": "none, or unprotected where the kernel allows no namespaces"}
    )


def _code(given: Code) -> Scorer:
    if given.allow_execution is not True:
        raise UsageError("code: this runs what a model wrote; read docs/rules.md, then say allow_execution=true")
    for name, known in (("block", ("first", "last", "all")), ("network", ("none", "unprotected"))):
        if getattr(given, name) not in known:
            raise UsageError(f"code: no {name} {getattr(given, name)!r}{did_you_mean(getattr(given, name), known)}")
    limits = sandbox.Limits(given.seconds, given.memory, given.disk, given.network == "none")
    sandbox.check(limits)

    def score(item: Item) -> Score:
        tests = _tests(needed(dict(item.metadata), given.tests), given.tests)
        failed = sandbox.failures(solution(_response(item), given.block), tests, limits)
        passed = failed.count("")
        facts: dict[str, Any] = {"passed": passed, "tests": len(tests)}
        if passed < len(tests):
            facts["error"] = next(filter(None, failed))
        share = passed / len(tests)
        return Score(float(share == 1) if given.all_or_nothing else share, facts)

    return score


def solution(response: str, block: str) -> str:
    """The code of a response: its Python blocks, or all of it where it has none."""
    blocks = _blocks(response, ("python", "python3", "py")) or _blocks(response, ("",)) or [response]
    return {"first": blocks[0], "last": blocks[-1], "all": "\n".join(blocks)}[block]


def _tests(found: Any, where: str) -> list[sandbox.Test]:
    several = found if isinstance(found, list) else [found]
    if not several:
        raise Reject("missing_field", f"{where} is an empty list")
    return [_test(one, where) for one in several]


def _test(given: Any, where: str) -> sandbox.Test:
    if isinstance(given, str) and given.strip():
        return given
    if isinstance(given, dict) and set(given) == {"input", "output"}:
        return sandbox.Program(*(_text(given[name], f"{where}.{name}") for name in ("input", "output")))
    raise Reject("wrong_type", f"{where}: a test is Python or an object of input and output, not {show(given)}")


# --- a function of the user ----------------------------------------------------------------------


@dataclass(frozen=True)
class Python:
    function: str = field(
        metadata={"description": "`module:function` or `file.py:function` of (prompt, response, metadata) → number"}
    )
    ends: list[float] | None = field(default=None, metadata={"description": "[least, greatest] score, if there are"})


def _python(given: Python) -> Scorer:
    function, ends = _function(given.function)[0], _ends(given)

    def score(item: Item) -> Score:
        try:
            value = function(*copy.deepcopy((list(item.prompt), _response(item), dict(item.metadata))))
        except (Exception, SystemExit) as error:
            raise Reject("labeller_failed", _told(error)) from None
        return Score(_inside(_real(value, given.function), ends))

    return score


def _real(value: Any, where: str) -> float:
    """A number of Python, or a scalar of numpy or torch."""
    try:
        if isinstance(value, numbers.Real) or getattr(value, "shape", None) == ():
            return float(value)
    except (ValueError, TypeError, OverflowError):
        pass
    raise Reject("invalid_score", f"{where} returned {show(value)[:200]}, not a number")


def _told(error: BaseException) -> str:
    """The exception, and the last line of the user's that it came through."""
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first is ours
    where = f"{Path(frames[-1].filename).name} line {frames[-1].lineno}: " if frames else ""
    return f"{where}{''.join(traceback.format_exception_only(error)).strip()}"[:500]


def _inside(value: float, ends: tuple[float, float] | None) -> float:
    if not math.isfinite(value):
        raise Reject("invalid_score", f"the score is {value}")
    if ends and not ends[0] <= value <= ends[1]:
        raise Reject("invalid_score", f"the score {value:g} is not in [{ends[0]:g}, {ends[1]:g}]")
    return value


def _ends(given: Python) -> tuple[float, float] | None:
    return None if given.ends is None else _range(given.ends, "python: ends")


def _range(value: Any, where: str) -> tuple[float, float]:
    try:
        least, greatest = map(float, value)
    except (TypeError, ValueError):
        raise UsageError(f"{where} must be [least, greatest], not {value!r}") from None
    if not -math.inf < least < greatest < math.inf:
        raise UsageError(f"{where} must be [least, greatest], not {value!r}")
    return least, greatest


def _function(name: str) -> tuple[Callable[..., Any], Path]:
    """The function, and the file it is in."""
    module_name, _, attribute = name.rpartition(":")
    if not module_name or not attribute:
        raise UsageError(f"python: {name!r} is not `module:function` or `file.py:function`")
    try:
        module = _file(Path(module_name)) if module_name.endswith(".py") else importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise UsageError(f"python: {module_name} cannot be imported ({type(error).__name__}: {error})") from None
    function = getattr(module, attribute, None)
    if not callable(function):
        known = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise UsageError(f"python: {module_name} has no function {attribute!r}{did_you_mean(attribute, known)}")
    file = getattr(module, "__file__", None)
    if not file:
        raise UsageError(f"python: {module_name} has no file, so that it cannot be told when it changes")
    return function, Path(file)


def _file(path: Path) -> ModuleType:
    """A module made of a file; imported once in a process, for its functions may keep what they load."""
    name = f"_rule_{_hash(str(path.resolve()))[:16]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec
        assert spec.loader
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _python_facts(given: Python) -> dict[str, Any]:
    return {"source": hashlib.sha256(_function(given.function)[1].read_bytes()).hexdigest(), "ends": given.ends}


def _python_name(given: Python) -> str:
    module, _, function = given.function.rpartition(":")
    return f"{Path(module).stem if module.endswith('.py') else module}:{function}"


# --- attributes ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attributes:
    weights: dict[str, float] = field(metadata={"description": "path in the metadata → weight"})
    ranges: dict[str, Any] = field(
        default_factory=dict, metadata={"description": "path → [least, greatest]; a number outside is rejected"}
    )


def _attributes(given: Attributes) -> Scorer:
    weights = _weights(given)
    ranges = {path: _range(ends, f"attributes: the range of {path}") for path, ends in given.ranges.items()}
    if unknown := [path for path in ranges if path not in weights]:
        raise UsageError(
            f"attributes: a range for {unknown[0]!r}, which has no weight{did_you_mean(unknown[0], weights)}"
        )
    ends = _attribute_ends(given)

    def score(item: Item) -> Score:
        metadata = dict(item.metadata)
        total = sum(weight * _number(metadata, path, ranges.get(path)) for path, weight in weights.items())
        total = _inside(total, None)
        return Score(min(max(total, ends[0]), ends[1]) if ends else total)  # sums of floats can miss the ends

    return score


def _weights(given: Attributes) -> dict[str, float]:
    if not isinstance(given.weights, dict) or not given.weights or not isinstance(given.ranges, dict):
        raise UsageError("attributes: weights and ranges are `path: value` lines of a YAML file")
    for path, weight in given.weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise UsageError(f"attributes: the weight of {path} must be a number, not {weight!r}")
    return given.weights


def _number(metadata: dict[str, Any], path: str, ends: tuple[float, float] | None) -> float:
    """A number, a text that is one, or a truth value as 0 or 1."""
    value = needed(metadata, path)
    try:
        if not isinstance(value, str | bool | int | float):
            raise ValueError
        number = float(value)
    except (ValueError, OverflowError):
        raise Reject("wrong_type", f"{path} is {show(value)}, not a number") from None
    if not math.isfinite(number):
        raise Reject("invalid_score", f"{path} is {number}")
    if ends and not ends[0] <= number <= ends[1]:
        raise Reject("reward_out_of_range", f"{path} is {number:g}, not in [{ends[0]:g}, {ends[1]:g}]")
    return number


def _attribute_ends(given: Attributes) -> tuple[float, float] | None:
    """Of the weighted sum, where every attribute has a range."""
    if set(given.ranges) != set(given.weights):
        return None
    products = [sorted(w * float(end) for end in given.ranges[path]) for path, w in given.weights.items()]
    least, greatest = math.fsum(p[0] for p in products), math.fsum(p[1] for p in products)
    return (least, greatest) if least < greatest else None


# --- kinds ---------------------------------------------------------------------------------------


def _each(score: Scorer, items: Sequence[Item]) -> Iterator[list[tuple[int, Outcome]]]:
    return ([(i, _outcome(score, item))] for i, item in enumerate(items))


def _plainly(score: Scorer, items: Sequence[Item]) -> Iterator[tuple[int, Outcome]]:
    return ((i, _outcome(score, item)) for i, item in enumerate(items))


def _outcome(score: Scorer, item: Item) -> Outcome:
    try:
        return score(item)
    except Reject as reject:
        return reject


def _check(name: str, given: Any) -> None:
    """`UsageError` for a setting of another type than the settings class says, or a limit that leaves nothing."""
    kinds = {str: str, bool: bool, int: int, float: int | float}
    for one in dataclasses.fields(given):
        value, kind = getattr(given, one.name), one.type
        if kind in kinds and (not isinstance(value, kinds[kind]) or isinstance(value, bool) != (kind is bool)):
            raise UsageError(f"{name}: {one.name} must be {kind.__name__}, not {value!r}")
        if one.name in ("seconds", "memory", "disk") and not 0 < value < math.inf:
            raise UsageError(f"{name}: {one.name} must be more than 0, not {value!r}")
    for path in getattr(given, "weights", None) or [getattr(given, key, "") for key in ("answer", "schema", "tests")]:
        try:
            parse(str(path) or "none")
        except ValueError as error:
            raise UsageError(f"{name}: the path {path!r} {error}") from None


def _settings_of(given: Any, *without: str) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(given).items() if name not in without}


def _versions(*packages: str) -> dict[str, str | None]:
    return {package: _version(package) for package in packages}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def _schema_facts(given: JsonSchema) -> dict[str, Any]:
    return _settings_of(given, "schema_file") | {"file": _schema_of(given)} | _versions("jsonschema")


def _kind(
    name: str,
    settings: type,
    make: Callable[[Any], Scorer],
    *,
    facts: Callable[[Any], dict[str, Any]] = _settings_of,
    ends: Callable[[Any], tuple[float, float] | None] = lambda given: (0.0, 1.0),
    label: Callable[[Any], str] | None = None,
    keep: bool = False,
    help: str,
) -> Kind:
    """A kind of rule; `facts` is what its scores depend on beside the item, `keep` whether they are cached."""

    def identity(given: Any) -> Identity:
        return Identity(f"rule:{label(given) if label else name}", facts(given), ends(given))

    def identify(given: Any) -> Identity:
        _check(name, given)
        make(given)
        return identity(given)

    def load(given: Any, cache: Cache) -> Labeller:
        score = make(given)
        return cached(partial(_each, score), identity(given), cache) if keep else partial(_plainly, score)

    return Kind(settings, identify, load, help=help)


KINDS = {
    "exact-match": _kind(
        "exact-match", ExactMatch, _exact_match, help="1 if the response, or what is extracted from it, is the answer"
    ),
    "regex": _kind(
        "regex",
        Regex,
        _regex,
        facts=lambda given: _settings_of(given) | _versions("regex"),
        help="1 if a pattern is found in the response",
    ),
    "math": _kind(
        "math",
        Mathematics,
        _mathematics,
        facts=lambda given: _settings_of(given) | _versions("math-verify", "latex2sympy2_extended", "sympy"),
        keep=True,
        help="1 if the response's final answer equals the answer as mathematics",
    ),
    "json-schema": _kind(
        "json-schema",
        JsonSchema,
        _json_schema,
        facts=_schema_facts,
        help="1 if the response is JSON that conforms to a schema",
    ),
    "length": _kind(
        "length",
        Length,
        _length,
        facts=_length_facts,
        help="1 if the length lies in a window; outside 0, or what the falloff leaves",
    ),
    "code": _kind(
        "code",
        Code,
        _code,
        facts=lambda given: _settings_of(given) | {"python": platform.python_version()},
        keep=True,
        help="the share of tests that the response's code passes in a sandbox",
    ),
    "python": _kind(
        "python",
        Python,
        _python,
        facts=_python_facts,
        ends=_ends,
        label=_python_name,
        keep=True,
        help="what a Python function of yours returns",
    ),
    "attributes": _kind(
        "attributes", Attributes, _attributes, ends=_attribute_ends, help="a weighted sum of numbers in the metadata"
    ),
}
