"""A round's responses: prompts rendered, samples drawn from the policy, rewards given.

What is sampled is on the disk before it is rewarded, so that no kill loses it. All of it is a function of the seed, the
round's number and the weights.
"""

import dataclasses
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from accelerate import Accelerator

from pipelines import engines, render
from pipelines.engines import Sampled
from pipelines.engines.sampling import TransformersSampler
from pipelines.labellers.base import Item
from pipelines.prompts import Prompt
from schemas.errors import Reject, UsageError, UserError
from una_train import policy, rounds
from una_train.config import OnlineConfig
from una_train.data import Split
from una_train.rewards import Rewards
from una_train.rounds import Round

PENALISED, LEFT_OUT = "penalised", "left out"  # how what was decided about a response ends
ALONE = f"no other response to compare it with: {LEFT_OUT}"

# --- prompts -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """The prompts of a run, rendered, and what turns token ids into texts."""

    prompts: list[Prompt]
    ids: list[list[int]]
    texts: list[str]  # their messages as JSON
    renderer: render.Renderer
    refused: Counter[str]
    digest: str

    def split(self, of: Round, config: OnlineConfig) -> Split:
        return rounds.split_of(of, self.ids, config)

    def items(self, places: Sequence[int], responses: Sequence[str]) -> list[Item]:
        """What a labeller is asked about."""
        of = (self.prompts[i] for i in places)
        return [Item(p.messages, (text,), p.metadata) for p, text in zip(of, responses, strict=True)]


def rendered(
    found: list[Prompt], refused: Counter[str], renderer: render.Renderer, model_dir: Path, config: OnlineConfig
) -> World:
    """Prompts that leave room for a response in the model's context, as token ids: as many as the rounds take."""
    text = transformers.AutoConfig.from_pretrained(model_dir).get_text_config()
    context = getattr(text, "max_position_embeddings", None) or 2**31
    most = context - config.max_new_tokens
    if most < 1:
        raise UsageError(f"max_new_tokens={config.max_new_tokens}: the context of {model_dir} is {context} tokens")
    prompts, ids, refused = list[Prompt](), list[list[int]](), Counter(refused)
    order = np.random.default_rng([config.seed, 0]).permutation(len(found))
    wanted = config.rounds * config.prompts_per_round
    for i in order:
        if len(prompts) == wanted:
            break
        try:
            rendered = renderer.prompt_ids(found[i].messages)
            if len(rendered) > most:
                raise Reject("too_long", f"{len(rendered)} tokens")
        except Reject as why:
            refused[why.reason] += 1
            continue
        prompts.append(found[i])
        ids.append(rendered)
    if not prompts:
        reasons = ", ".join(f"{reason} {n}" for reason, n in sorted(refused.items()))
        raise UserError(
            f"no prompt can be used ({reasons}); of {context} tokens, {config.max_new_tokens} are for the response"
        )
    content = json.dumps([[p.id, p.metadata] for p in prompts], sort_keys=True, default=str)
    digest = hashlib.sha256(content.encode(errors="backslashreplace")).hexdigest()
    return World(prompts, ids, rounds.prompt_texts(prompts), renderer, refused, digest)


def places_of(count: int, number: int, config: OnlineConfig) -> list[int]:
    """Which prompts a round takes: the next ones, in an order that is drawn anew for each pass after the first."""
    size = min(config.prompts_per_round, count)
    start = (number - 1) * size
    found: list[int] = []
    for epoch in range(start // count, (start + size - 1) // count + 1):
        order = np.random.default_rng([config.seed, epoch]).permutation(count) if epoch else np.arange(count)
        found += order[max(0, start - epoch * count) : start + size - epoch * count].tolist()
    return found


# --- samples -----------------------------------------------------------------------------------


class Sampling:
    """Samples from the policy while it is trained; parts of a round are kept on the disk as soon as they are there."""

    def __init__(
        self,
        accelerator: Accelerator,
        scorer: policy.Scorer,
        layout: str,
        world: World,
        config: OnlineConfig,
        output: Path,
        start: Callable[..., Any],
    ):
        """`start`: starts the engine that samples elsewhere, see `engines.load_sampler`."""
        self.accelerator, self.scorer, self.layout, self.world = accelerator, scorer, layout, world
        self.config, self.output, self._start = config, output, start
        self._engine: Any = None
        self._current = False  # whether the engine has the policy's weights of now
        self._here = TransformersSampler(scorer.policy, world.renderer.end_of_turn, config.rollout_tokens)

    def round(self, number: int, places: list[int]) -> Round:
        """A round's responses; parts that a killed run left are taken as they are."""
        size, parts = self.config.rollout_prompts, []
        for i in range(0, len(places), size):
            path = self._part(number, i)
            if path.exists():
                parts.append(rounds.read(path))
                continue
            parts.append(self._sampled(number, i, places[i : i + size]))
            rounds.write(path, parts[-1], self.world.texts)
        return rounds.merged(parts)

    def forget(self, number: int) -> None:
        """The round is whole, and its parts are no longer needed."""
        for path in (self.output / "rounds").glob(f"part-{number:06d}-*.parquet"):
            path.unlink()

    def _part(self, number: int, first: int) -> Path:
        return self.output / "rounds" / f"part-{number:06d}-{first:08d}.parquet"

    def _sampled(self, number: int, first: int, places: list[int]) -> Round:
        seeds = [_seed(self.config, number, first + i) for i in range(len(places))]
        return self._round(number, places, self._sample(places, self.config.samples_per_prompt, seeds))

    def _round(self, number: int, places: list[int], found: list[list[Sampled]]) -> Round:
        of = [place for place, samples in zip(places, found, strict=True) for _ in samples]
        every = [one for samples in found for one in samples]
        return Round(number, of, every, [self.world.renderer.words(one.ids) for one in every])

    def _sample(self, places: list[int], n: int, seeds: list[int]) -> list[list[Sampled]]:
        prompts, config = [self.world.ids[place] for place in places], self.config
        how = engines.Decoding(config.max_new_tokens, n, config.temperature, config.top_p)
        if config.engine != "transformers":
            return self._elsewhere().sample(prompts, how, seeds)
        self.scorer.use(False, self.scorer.chunked)  # attention with a cache
        try:
            with self.accelerator.autocast():
                return self._here.sample(prompts, how, seeds)
        finally:
            self.scorer.use(self.layout != "padded", self.scorer.chunked)

    def _elsewhere(self) -> Any:
        """The engine, which has the policy's weights of now."""
        if self._engine is None:
            self._engine = self._start(
                max_length=max(map(len, self.world.ids)) + self.config.max_new_tokens,
                end_of_turn=self.world.renderer.end_of_turn,
                adapter=str(self._saved()) if self.config.lora else None,
            )
        if not self._current:
            self._engine.update(self._saved())
            self._current = True
        return self._engine

    def _saved(self) -> Path:
        """The policy's weights, or its adapter, as files that an engine reads."""
        where = self.output / ".engine-weights"
        weights = self.scorer.policy.state_dict()
        if not self.config.lora:
            weights = {name: value.to(policy.DTYPES[self.config.dtype]) for name, value in weights.items()}
        self.scorer.policy.save_pretrained(where, state_dict=weights)
        return where

    def moved(self) -> None:
        """The policy has changed: an engine elsewhere needs its weights before it samples again."""
        self._current = False

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
        self._engine = None
        shutil.rmtree(self.output / ".engine-weights", ignore_errors=True)

    def reference_rewards(self, of: Round, reward: Rewards) -> list[np.ndarray]:
        """Rewards of responses that the reference, which is in the policy's place, gives to each response's prompt."""
        places, n = sorted(set(of.places)), self.config.reference_samples
        seeds = [_seed(self.config, of.number, i) + 1 for i in range(len(places))]
        these = self._round(of.number, places, self._sample(places, n, seeds))
        rewarded(these, self.world, reward, None, dataclasses.replace(self.config, missing_eos="penalize"))
        rewards = np.nan_to_num(these.rewards, nan=self.config.penalty).reshape(len(places), n)
        by_prompt = dict(zip(places, rewards, strict=True))
        return [by_prompt[place] for place in of.places]


def _seed(config: OnlineConfig, number: int, i: int) -> int:
    """What the samples to the i-th prompt of a round depend on."""
    return int(np.random.SeedSequence([config.seed, number, i]).generate_state(1)[0]) * 2


# --- rewards -----------------------------------------------------------------------------------


def rewarded(of: Round, world: World, reward: Rewards, held_out: Rewards | None, config: OnlineConfig) -> None:
    """Fill in raw scores, rewards, and what was decided about which response."""
    n = len(of.places)
    of.why = [_decided(*one, config) for one in zip(of.responses, of.sampled, strict=True)]
    of.raw, of.held_out = np.full(n, np.nan), np.full(n, np.nan)
    lost = Counter(place for place, why in zip(of.places, of.why, strict=True) if why and why.endswith(PENALISED))
    if reward.pairs:
        there = Counter(place for place, why in zip(of.places, of.why, strict=True) if not why) + lost
        of.why = [why or (ALONE if there[of.places[i]] == 1 else None) for i, why in enumerate(of.why)]
    open_ = [i for i, why in enumerate(of.why) if why is None]
    places = [of.places[i] for i in open_]
    items = world.items(places, [of.responses[i] for i in open_])
    scores = reward.win_rates(items, places, lost) if reward.pairs else reward.raw(items)
    for i, score in zip(open_, scores, strict=True):
        if isinstance(score, Reject):
            of.why[i] = f"{score.reason}: {score.detail}"
        else:
            of.raw[i] = score
    _check_rewarded(of, config)
    of.rewards = reward.calibrated(of.raw) if np.isfinite(of.raw).any() else of.raw.copy()
    of.rewards[[i for i, why in enumerate(of.why) if why and why.endswith(PENALISED)]] = config.penalty
    if held_out and open_:
        raw = np.array([np.nan if isinstance(s, Reject) else s for s in held_out.raw(items)])
        of.held_out[open_] = held_out.calibrated(raw)


def _decided(text: str, sampled: Sampled, config: OnlineConfig) -> str | None:
    """What is decided about a response before anybody is asked for its reward."""
    if not text.strip():
        return f"blank: {PENALISED}"
    if not sampled.finished and config.missing_eos != "keep":
        return f"no end: {PENALISED if config.missing_eos == 'penalize' else LEFT_OUT}"
    return None


def _check_rewarded(of: Round, config: OnlineConfig) -> None:
    """`UserError` when too many responses got no score; the samples stay, for when the labeller is mended."""
    lost = [why for why in of.why if why and not why.endswith((PENALISED, LEFT_OUT))]
    if len(lost) > config.max_unrewarded * len(of.why):
        raise UserError(
            f"round {of.number}: {len(lost)} of {len(of.why)} responses got no score, more than max_unrewarded="
            f"{config.max_unrewarded:g}; the first: {lost[0]}"
        )
