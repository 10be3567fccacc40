"""A small world whose true reward is known: requests for notes, and notes of varied quality.

Everything follows from a seed and needs no network and no torch. A request names a person, a topic,
a tone, a number of sentences and a closing; `true_reward` reads how well a note does what was asked
from its text alone. `write_feedback` turns noisy opinions about notes into four raw files, each in a
shape people really have. The held-out requests never appear in them, nor in `conversations`.
"""

import csv
import gzip
import io
import json
import math
import random
import re
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

PEOPLE = ["Anna", "Boris", "Carla", "David", "Elena", "Farid", "Greta", "Hugo", "Irene", "Jonas", "Karin", "Luis"]
PEOPLE += ["Maria", "Nadia", "Oscar", "Petra", "Quinn", "Rosa", "Stefan", "Tanya", "Ulrich", "Vera", "Walter", "Zoe"]
THINGS = ["budget", "garden", "wedding", "printer", "concert", "invoice", "kitchen", "holiday", "contract", "library"]
THINGS += ["website", "workshop", "parking", "heating", "delivery", "interview", "museum", "picnic", "harbour", "party"]
TOPICS = [f"the {thing}" for thing in THINGS]
CLOSINGS = ("Best regards", "Take care", "Many thanks", "See you soon")
HELD_OUT = 300  # a constant: with another number, requests seen in training would count as unseen
NUMBERS = {"one": 1, "two": 2, "three": 3}
# Tone → the sentences that open a note in that tone, and those that may follow.
TONES = {
    "formal": (
        ("I am writing to you with regard to {}.", "Please be informed of the decision on {}."),
        ("We remain at your disposal.", "A written reply would be appreciated.", "Kindly confirm the receipt."),
    ),
    "friendly": (
        ("I just had a lovely idea for {}!", "Guess what I heard about {}!"),
        ("It made my whole day!", "I would love to hear from you!", "Let us have coffee and talk!"),
    ),
    "apologetic": (
        ("I am so sorry about {}.", "I apologise for my mistake with {}."),
        ("It was entirely my fault.", "I promise to do better.", "Please forgive me."),
    ),
    "urgent": (
        ("We need a decision on {} right now!", "There is no time left for {}!"),
        ("Call me within the hour!", "Every minute counts!", "Drop everything else today!"),
    ),
}
RUDE = ("You idiot, nobody asked you.", "Only a fool would care.", "This is stupid, and so are you.")
RAMBLING = (
    "The weather was grey on Tuesday.",
    "My cousin owns a bicycle.",
    "Some people like tea.",
    "There are many things in the world.",
    "Anyway, as one says.",
)
PHRASINGS = (
    "Write {person} a note of {count} about {topic}. Keep the tone {tone} and close with: {closing}",
    "Please write to {person} about {topic}. Tone: {tone}. Length: {count}. Closing: {closing}",
    "I need {count} for {person} about {topic}. Make it {tone} and sign it with: {closing}",
)


class Request(NamedTuple):
    """What a prompt asks for."""

    person: str
    topic: str
    tone: str
    sentences: int
    closing: str


# --- prompts -----------------------------------------------------------------------------------


def prompts(seed: int) -> tuple[list[str], list[str]]:
    """All requests as texts, shuffled: the training prompts, and the `HELD_OUT` ones that nothing is trained on."""
    rng = random.Random(f"prompts {seed}")
    requests = [Request(*r) for r in product(PEOPLE, TOPICS, TONES, NUMBERS.values(), CLOSINGS)]
    rng.shuffle(requests)
    texts = [phrase(request, rng.choice(PHRASINGS)) for request in requests]
    return texts[HELD_OUT:], texts[:HELD_OUT]


def phrase(request: Request, phrasing: str) -> str:
    """The request as the user's words."""
    number = next(word for word, n in NUMBERS.items() if n == request.sentences)
    count = f"{number} sentence{'s' * (request.sentences > 1)}"
    return phrasing.format(count=count, **request._asdict())


def read_prompt(prompt: str) -> Request:
    """What the prompt asks for, read from its words; `ValueError` unless each part is named exactly once."""

    def only(options: Iterable[str]) -> str:
        found = re.findall(rf"\b(?:{'|'.join(options)})\b", prompt)
        if len(found) != 1:
            raise ValueError(f"{prompt!r} names {found or 'none'} of: {', '.join(options)}")
        return found[0]

    count = NUMBERS[only([f"{word} sentences?" for word in NUMBERS]).split()[0]]
    return Request(only(PEOPLE), only(TOPICS), only(TONES), count, only(CLOSINGS))


# --- the truth ---------------------------------------------------------------------------------


def true_reward(prompt: str, response: str) -> float:
    """How well the response's text does what the prompt asks, in [0, 1]; 0 for a note without a body.

    Out of 20: addressee 3, closing 3, number of sentences 4, topic 5, tone 5; halved for each insult.
    """
    request = read_prompt(prompt)
    greeting, body, closing = split_note(response)
    if not body:
        return 0.0
    points = 3 * (greeting == f"Dear {request.person},") + 3 * (closing == request.closing)
    points += 4 / (1 + abs(len(body) - request.sentences))
    points += 5 * _topic_share(request.topic, body) + 5 * _tone_share(request, body)
    return points / 20 * 0.5 ** sum(sentence in RUDE for sentence in body)


def split_note(response: str) -> tuple[str, list[str], str]:
    """Greeting, sentences of the body and closing; whatever is neither greeting nor closing is body."""
    pieces = [p for p in re.split(r"(?<=[.!?])\s+|\n+", response.strip()) if p]
    greeting = pieces.pop(0) if pieces and re.fullmatch(r"Dear \w+,", pieces[0]) else ""
    closing = pieces.pop() if pieces and pieces[-1] in CLOSINGS else ""
    return greeting, pieces, closing


def _topic_share(topic: str, body: list[str]) -> float:
    """Share of the right topic among the topics that the body mentions."""
    mentioned = set(re.findall(rf"\b(?:{'|'.join(TOPICS)})\b", " ".join(body)))
    return (topic in mentioned) / max(1, len(mentioned))


def _tone_share(request: Request, body: list[str]) -> float:
    """Share of different sentences in the right tone: repeating one or adding others does not help."""
    openings, others = TONES[request.tone]
    plain = {re.sub("|".join(TOPICS), "{}", sentence) for sentence in body}
    return len(plain & {*openings, *others}) / max(request.sentences, len(body))


def labelled(prompt: list[dict[str, Any]], response: str, metadata: dict[str, Any]) -> float:
    """The true reward, as a rule of `una label` and `una online` asks for it."""
    return true_reward(prompt[-1]["content"], response)


def best_response(prompt: str) -> str:
    """A note whose true reward is 1."""
    return write_note(prompt, care=1.0, rng=random.Random(prompt))


# --- notes of varied quality -------------------------------------------------------------------


def write_note(prompt: str, care: float, rng: random.Random) -> str:
    """A note by a writer who gets each thing right with a probability that grows with `care` (0 to 1; at 1, all)."""
    request = read_prompt(prompt)

    def heed(right: Any, options: list) -> Any:
        return right if rng.random() < 0.1 + 0.9 * care else rng.choice(options)

    person = heed(request.person, PEOPLE)
    openings, others = TONES[heed(request.tone, list(TONES))]
    count = heed(request.sentences, [1, 2, 3, 4])
    body = [rng.choice(openings).format(heed(request.topic, TOPICS)), *rng.sample(others, min(count - 1, len(others)))]
    if rng.random() < 0.6 * (1 - care):
        body += rng.sample(RAMBLING, rng.randint(1, 3))
    if rng.random() < 0.5 * (1 - care):
        body.insert(rng.randint(0, len(body)), rng.choice(RUDE))
    lines = [f"Dear {person},", " ".join(body), heed(request.closing, [*CLOSINGS, ""])]
    return "\n".join(line for line in lines if line)


def conversations(seed: int, n: int) -> list[tuple[str, str]]:
    """`n` training prompts, each with a note of any quality: what the base model is pretrained on."""
    rng = random.Random(f"conversations {seed}")
    train, _ = prompts(seed)
    return [(prompt, write_note(prompt, rng.random(), rng)) for prompt in rng.choices(train, k=n)]


# --- feedback ----------------------------------------------------------------------------------


def write_feedback(directory: Path, seed: int, n: int = 1500) -> dict[str, Path]:
    """Write `n` noisy records of each kind, a few of them broken, and return the path of each kind's file.

    `comparisons` (TRL preference, conversational JSONL), `thumbs` (TRL unpaired, gzipped JSONL), `ratings`
    (HelpSteer CSV, two notes for each prompt in turn) and `demonstrations` (alpaca JSON array).
    """
    directory.mkdir(parents=True, exist_ok=True)
    train, _ = prompts(seed)
    paths = {}
    for kind, (name, make) in FILES.items():
        rng = random.Random(f"{kind} {seed}")
        paths[kind] = directory / name
        paths[kind].write_bytes(make(rng.choices(train, k=n), rng))
    return paths


def comparisons(chosen_prompts: list[str], rng: random.Random) -> bytes:
    """Which of two notes somebody prefers: Bradley–Terry with the true reward times 8 as strength."""
    lines = []
    for prompt in chosen_prompts:
        first, second = _two_notes(prompt, rng)
        better = 8 * (true_reward(prompt, first) - true_reward(prompt, second))
        if rng.random() > _sigmoid(better):
            first, second = second, first
        sides = {"prompt": ("user", prompt), "chosen": ("assistant", first), "rejected": ("assistant", second)}
        record = {side: [{"role": role, "content": text}] for side, (role, text) in sides.items()}
        lines.append(json.dumps(record))
    lines[len(lines) // 2] = lines[len(lines) // 2][:60]  # a file that was cut off and appended to
    return "\n".join(lines).encode() + b"\n"


def thumbs(chosen_prompts: list[str], rng: random.Random) -> bytes:
    """Thumbs up with probability σ(8·(true reward − 0.6))."""
    records = []
    for prompt in chosen_prompts:
        note = write_note(prompt, rng.random(), rng)
        up = rng.random() < _sigmoid(8 * (true_reward(prompt, note) - 0.6))
        records.append({"prompt": prompt, "completion": note, "label": up})
    records[len(records) // 3]["completion"] = ""
    records[len(records) // 2]["label"] = None
    return gzip.compress("".join(json.dumps(r) + "\n" for r in records).encode(), mtime=0)


def ratings(chosen_prompts: list[str], rng: random.Random) -> bytes:
    """Ratings from 0 to 4: three follow the true reward with noise, two say nothing about it."""
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(["prompt", "response", "helpfulness", "correctness", "coherence", "complexity", "verbosity"])
    for prompt in chosen_prompts[: len(chosen_prompts) // 2]:
        for note in _two_notes(prompt, rng):
            quality = [_rating(4 * true_reward(prompt, note) + rng.gauss(0, 0.6)) for _ in range(3)]
            rows.writerow([prompt, note, *quality, rng.choice([0, 1, 1, 2]), _rating(len(split_note(note)[1]) - 1)])
    rows.writerow([chosen_prompts[-1], " ", 0, 0, 0, 0, 0])
    return out.getvalue().encode()


def demonstrations(chosen_prompts: list[str], rng: random.Random) -> bytes:
    """Notes by careful writers: most of them flawless."""
    records = [
        {"instruction": prompt, "input": "", "output": write_note(prompt, rng.choice([1.0, 1.0, 0.9, 0.7]), rng)}
        for prompt in chosen_prompts
    ]
    records[len(records) // 3]["output"] = ""
    return json.dumps(records, indent=1).encode()


FILES: dict[str, tuple[str, Callable[[list[str], random.Random], bytes]]] = {
    "comparisons": ("comparisons.jsonl", comparisons),
    "thumbs": ("thumbs.jsonl.gz", thumbs),
    "ratings": ("ratings.csv", ratings),
    "demonstrations": ("demonstrations.json", demonstrations),
}


def _two_notes(prompt: str, rng: random.Random) -> tuple[str, str]:
    """Two different notes."""
    first = second = write_note(prompt, rng.random(), rng)
    while second == first:
        second = write_note(prompt, rng.random(), rng)
    return first, second


def _rating(value: float) -> int:
    return min(4, max(0, round(value)))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))
