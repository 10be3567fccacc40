"""Online UNA: `command` prepares a run, `train` is its rounds, read from top to bottom.

A round samples responses from the policy, has them rewarded by a labeller of `una label`, scores them under the
reference, and takes UNA's steps on them, on responses of earlier rounds and on an offline dataset. Log-ratios are
always against the reference, never against the policy that sampled; that one's log-probs tell how far it has moved.
All of a round is a function of the seed, its number and the weights: a checkpoint is those of training with the number
of rounds done, and rounds after it are done again from their files without sampling a token.

Left out: several processes, and comparisons by labellers that need two responses.
"""

import argparse
import dataclasses
import hashlib
import json
import logging
import math
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm.auto import tqdm

from pipelines import engines, render
from pipelines import prompts as asked
from pipelines.engines import Sampled
from pipelines.engines.sampling import EngineDied, TransformersSampler
from pipelines.labellers.base import Item
from pipelines.prompts import Prompt
from schemas.errors import Reject, UsageError, UserError
from schemas.fingerprint import local_model
from una_train import config as settings
from una_train import data, evaluate, policy, rounds, rundir, watch
from una_train.alarms import alarms
from una_train.config import OnlineConfig
from una_train.data import Split
from una_train.evaluate import Judged
from una_train.objective import Objectives
from una_train.offsets import FROM_REFERENCE
from una_train.reference import Reference
from una_train.rewards import Rewards
from una_train.rounds import Round
from una_train.train import Learner, accelerator_of, learning_rate, planned_steps, required, with_dtype

log = logging.getLogger("una_train")

RESTARTS = 3  # of an engine in a row
OFFLINE, REPLAY = 1, 2  # what random numbers of a round are for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompts", metavar="PROMPTS", help="a file of prompts, or a dataset directory")
    parser.add_argument("--model", required=True, help="what is trained, and the reference: a directory, or a hub id")
    parser.add_argument("--reward", required=True, metavar="SPEC", help="a labeller, as in una label --labeller")
    parser.add_argument(
        "--held-out-reward", metavar="SPEC", help="a labeller that is not trained on: an alarm tells when it disagrees"
    )
    parser.add_argument("--offline", metavar="DIR", help="a published dataset to mix in (see offline_ratio)")
    settings.add_arguments(parser)


def command(args: argparse.Namespace) -> dict[str, Any]:
    """Train online, and return the summary: policy, rounds, reward, kl, seconds."""
    if "://" in args.output:
        raise UsageError(f"--output {args.output}: training writes to a local directory; name one, and copy it there")
    output, offline = Path(args.output), Path(args.offline) if args.offline else None
    config = _settings(args, output)
    inputs = [Path(p) for p in (args.prompts, args.model, args.offline) if p]
    rundir.check(output, args.overwrite, args.resume, inputs)
    accelerator = accelerator_of(config, output)
    if accelerator.num_processes > 1:
        raise UsageError("una online runs in one process; give it one GPU, or more rounds")
    accelerator.gradient_accumulation_steps = 1
    transformers.utils.logging.disable_progress_bar()
    model_dir = local_model(args.model)
    renderer = render.load(model_dir)
    found, refused = asked.usable(args.prompts)
    world = _rendered(found, refused, renderer, model_dir, config)
    for reason, count in sorted(world.refused.items()):
        log.warning("%s: %d prompts are left out (%s)", args.prompts, count, reason)
    with rundir.locked(output):
        reward = Rewards(args.reward, config.calibrate, config.reward_temperature)
        held_out = Rewards(args.held_out_reward, "auto", 1.0) if args.held_out_reward else None
        mixed = _offline(offline, config)
        facts = rundir.facts_of(args.model, args.prompts, config, model_dir, world.digest) | {
            "reward": reward.facts,
            "held_out_reward": held_out and held_out.facts,
            "offline": args.offline,
            "prompts": {"used": len(world.prompts), "left_out": dict(sorted(world.refused.items()))},
        }
        if args.resume:
            rundir.check_same_run(output, facts, ("reward", "held_out_reward", "offline"))
        checkpoint = rundir.newest_checkpoint(output) if args.resume else None
        try:
            return train(
                accelerator, config, world, reward, held_out, mixed, model_dir, output, checkpoint, args.resume, facts
            )
        except KeyboardInterrupt:
            raise UserError("interrupted; nothing that was finished is lost: continue with --resume") from None


# --- the rounds --------------------------------------------------------------------------------


def train(
    accelerator: Accelerator,
    config: OnlineConfig,
    world: "World",
    reward: Rewards,
    held_out: Rewards | None,
    offline: Split | None,
    model_dir: Path,
    output: Path,
    checkpoint: Path | None,
    resumed: bool,
    facts: dict[str, Any],
) -> dict[str, Any]:
    started = time.perf_counter()
    kinds = {"scalar"} | ({data.TYPES[i] for i in offline.types} if offline else set())
    from_reference = config.offset["scalar"] in FROM_REFERENCE

    # the policy, the reference it began as, and what samples from it
    set_seed(config.seed)
    loaded = policy.load(model_dir, config, checkpoint)
    scorer = policy.Scorer(loaded, any(config.offset.get(kind) == "learned" for kind in kinds))
    began = dict(loaded.named_parameters())
    if checkpoint is not None and not config.lora:
        began = dict(policy.load(model_dir, config).named_parameters())
    optimizer = policy.optimizer_of(scorer, config)
    model, optimizer = accelerator.prepare(scorer, optimizer)
    scorer = accelerator.unwrap_model(model)
    layout = policy.settle(scorer, config, accelerator.device)
    reference = Reference(model_dir, scorer, config, began)
    del began
    sampler = Sampling(accelerator, scorer, layout, world, config, model_dir, output)
    state = rundir.checkpoint_facts(checkpoint) if checkpoint else {}
    if checkpoint is not None:
        rundir.load_optimizer(scorer, optimizer.optimizer, checkpoint)
        log.info("continuing after round %d, from %s", state["step"], checkpoint)
    rundir.prepare(output, config, facts, checkpoint, keep=("rounds", "rewards") if resumed else ())
    (output / "rounds").mkdir(exist_ok=True)
    for labeller in filter(None, (reward, held_out)):
        labeller.load(output / "rewards")
    done, steps, beta_factor = state.get("step", 0), state.get("steps", 0), state.get("beta_factor", 1.0)
    started -= state.get("seconds", 0.0)
    offsets, reward.fitted = state.get("offsets", {}), state.get("calibration") or reward.fitted
    if held_out:
        held_out.fitted = state.get("held_out_calibration") or held_out.fitted
    learner = Learner(accelerator, model, optimizer, config, output, skipped=state.get("skipped_steps", 0))
    facts |= {
        "parameters": sum(p.numel() for p in scorer.policy.parameters()),
        "trainable_parameters": sum(p.numel() for p in scorer.policy.parameters() if p.requires_grad),
        "layout": layout,
        "reference_by": reference.how,
    }
    watched = watch.Watch(config.rounds, config)
    if config.offset["scalar"] != "none":
        watched.first["scalar"] = 1.0  # where rewards are near 1, an offset brings what is predicted there
    record = rundir.recorder(accelerator, config, output, done, watched)
    history = [line["online"] for line in rundir.metrics(output)]
    warned: set[str] = set()
    alarms(history, config.alarm_rounds, warned)  # those that were given before
    earlier: deque[Split] = deque(maxlen=config.replay_rounds)
    if config.replay_ratio:
        for number in range(max(1, done - config.replay_rounds + 1), done + 1):
            earlier.append(world.split(rounds.read(_file(output, number)), config, from_reference))
    planned = _steps_of(config, min(config.prompts_per_round, len(world.prompts)))
    bar = tqdm(total=config.rounds, initial=done, unit="round", disable=None)
    clock = Clock()

    for number in range(done + 1, config.rounds + 1):
        path = _file(output, number)
        clock.start()
        if path.exists():  # a run that was killed had come further than its checkpoint
            this = rounds.read(path)
            for of, raw in ((reward, this.raw), (held_out, this.held_out)):
                if of and of.fitted is None:
                    of.calibrated(raw)
            clock.lap("sampling")
        else:
            # rollout
            places = _places(len(world.prompts), number, config)
            this = sampler.round(number, places)
            clock.lap("sampling")

            # label
            rewarded(this, world, reward, held_out, config)
            clock.lap("reward")

            # reference
            if from_reference:
                with reference.in_place():
                    sampler.moved()
                    this.ref_rewards = sampler.reference_rewards(this, reward)
                sampler.moved()
            every = dataclasses.replace(this, rewards=np.zeros(len(this.places)))  # those that got no reward as well
            this.ref_logps = reference.score(accelerator, model, world.split(every, config), layout)
            clock.lap("reference")
            rounds.write(path, this, world.texts)
        sampler.forget(number)

        # UNA's steps
        fresh = world.split(this, config, from_reference)
        told = rounds.facts(this) | {"beta": beta_factor * config.beta["scalar"]}
        judged, rows = list[Judged](), Mixed(fresh, 0, 0)
        if words := _nothing_to_learn(fresh, config):
            log.warning("round %d: %s; no step is taken", number, words)
        else:
            rows = mixed(fresh, list(earlier), offline, number, config)
            now = dataclasses.replace(config, beta={kind: b * beta_factor for kind, b in config.beta.items()})
            objectives = Objectives(now, rows.split)
            objectives.load_state({kind: means for kind, means in offsets.items() if kind in objectives.running})
            order = data.Order(rows.split, config.batch_size, int(_rng(config, number).integers(2**31)))
            count = order.total(config.epochs, None)
            first = (number - 1) * planned
            for step, _ in planned_steps(
                accelerator, rows.split, order, range(1, count + 1), objectives, layout, False, now
            ):
                at = first + min(step.number, planned)  # a bundle more than planned may take a step more
                shape = learning_rate(at, planned * config.rounds, config) / config.learning_rate
                of_step, norm = learner.step(step, first + step.number, shape, objectives, rows.split)
                judged += of_step
            sampler.moved()
            steps, offsets = steps + count, {**offsets, **objectives.state()}
        clock.lap("training")
        if config.replay_ratio:
            earlier.append(fresh)

        # what it was like, and what follows from that
        told |= {"groups": len(rows.split.group_rows), "replayed": rows.replayed, "offline": rows.offline}
        told |= {"lone": int(fresh.lone.sum()) if fresh.lone is not None else 0, "steps": steps}
        told |= {"drift": _drift(judged, this), "seconds": clock.seconds}
        history.append(told)
        if told["lone"] and config.offset["scalar"] == "group_mean" and "lone" not in warned:
            warned.add("lone")
            log.warning(
                "round %d: %d responses have no other to their prompt that differs, so offset.scalar=group_mean has "
                "nothing to compare them with: the running mean (ema) takes its place for them",
                number,
                told["lone"],
            )
        for words in alarms(history, config.alarm_rounds, warned):
            log.warning("round %d: ALARM: %s", number, words)
        numbers = {"lr": optimizer.param_groups[0]["lr"], "grad_norm": norm if judged else None}
        epoch = number * config.prompts_per_round / len(world.prompts)
        record(number, epoch, "train", judged, numbers | {"online": evaluate.finite(told)})
        bar.update()
        bar.set_postfix(reward=_shown(told["reward"]), kl=_shown(told["kl"]))
        if config.kl_target is not None:
            off = min(max(told["kl"] / config.kl_target - 1, -0.2), 0.2)
            beta_factor *= 1 + config.kl_gain * off
        if config.save_every and number % config.save_every == 0:
            rundir.save_checkpoint(
                output,
                number,
                scorer.policy,
                rundir.gathered(scorer.policy.state_dict()),
                rundir.gathered(rundir.optimizer_state(scorer, optimizer.optimizer)),
                {
                    "seconds": time.perf_counter() - started,
                    "steps": steps,
                    "beta_factor": beta_factor,
                    "offsets": offsets,
                    "calibration": reward.fitted,
                    "held_out_calibration": held_out and held_out.fitted,
                    "skipped_steps": learner.skipped,
                },
                config.keep_checkpoints,
            )
    bar.close()
    sampler.close()

    final = _result(history, config)
    facts |= {"optimizer_steps": steps, "skipped_steps": learner.skipped, "calibration": reward.fitted}
    facts |= {"seconds": time.perf_counter() - started, "final": {"test": None, "online": final}}
    weights = rundir.gathered(scorer.policy.state_dict())
    policy.save(output / "policy", scorer.policy, weights, facts["model"], model_dir, config)
    rundir.write(output / "run.json", json.dumps(facts, indent=2) + "\n")  # last: now the run is complete
    accelerator.end_training()
    _print_result(final, facts, output)
    return {"policy": str(output / "policy"), "rounds": config.rounds, **final, "seconds": round(facts["seconds"], 3)}


class Clock:
    """Seconds of the parts of a round."""

    def start(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._last = round(now - self._last, 4), now


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

    def split(self, of: Round, config: OnlineConfig, ref_rewards: bool = False) -> Split:
        return rounds.split_of(of, self.ids, config, ref_rewards)

    def items(self, places: Sequence[int], responses: Sequence[str]) -> list[Item]:
        """What a labeller is asked about."""
        of = (self.prompts[i] for i in places)
        return [Item(p.messages, (text,), p.metadata) for p, text in zip(of, responses, strict=True)]


def _rendered(
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


def _places(count: int, number: int, config: OnlineConfig) -> list[int]:
    """Which prompts a round takes: the next ones, in an order that is drawn anew for each pass after the first."""
    size = min(config.prompts_per_round, count)
    start = (number - 1) * size
    found: list[int] = []
    for epoch in range(start // count, (start + size - 1) // count + 1):
        order = np.random.default_rng([config.seed, epoch]).permutation(count) if epoch else np.arange(count)
        found += order[max(0, start - epoch * count) : start + size - epoch * count].tolist()
    return found


# --- rollouts ----------------------------------------------------------------------------------


class Sampling:
    """Samples from the policy while it is trained; parts of a round are kept on the disk as soon as they are there."""

    def __init__(
        self,
        accelerator: Accelerator,
        scorer: policy.Scorer,
        layout: str,
        world: World,
        config: OnlineConfig,
        model_dir: Path,
        output: Path,
    ):
        self.accelerator, self.scorer, self.layout, self.world = accelerator, scorer, layout, world
        self.config, self.model_dir, self.output = config, model_dir, output
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
        found = self._sample(places, self.config.samples_per_prompt, seeds)
        every = [one for of in found for one in of]
        return Round(
            number,
            [place for place, of in zip(places, found, strict=True) for _ in of],
            every,
            [self.world.renderer.words(one.ids) for one in every],
        )

    def _sample(self, places: list[int], n: int, seeds: list[int]) -> list[list[Sampled]]:
        prompts = [self.world.ids[place] for place in places]
        how = {"temperature": self.config.temperature, "top_p": self.config.top_p}
        room = self.config.max_new_tokens
        if self.config.engine != "transformers":
            return self._elsewhere(lambda of: of.sample(prompts, n=n, max_new_tokens=room, seeds=seeds, **how))
        self.scorer.use(False, self.scorer.chunked)  # attention with a cache
        try:
            with self.accelerator.autocast():
                return self._here.sample(prompts, n=n, max_new_tokens=room, seeds=seeds, **how)
        finally:
            self.scorer.use(self.layout != "padded", self.scorer.chunked)

    def _elsewhere(self, call: Callable[[Any], list[list[Sampled]]]) -> list[list[Sampled]]:
        """Call an engine that has the policy's weights of now; one that died is started again, a few times."""
        for attempt in range(RESTARTS + 1):
            try:
                self._engine = self._engine or self._started()
                if not self._current:
                    self._engine.update(self._saved())
                    self._current = True
                return call(self._engine)
            except EngineDied as error:
                if attempt == RESTARTS:
                    raise UserError(f"{error}; it died {attempt + 1} times in a row: continue with --resume") from None
                log.warning("%s; starting it again, nothing that was finished is lost", error)
                self.close()
        raise AssertionError

    def _started(self) -> Any:
        self._current = False
        return engines.load_sampler(
            self.config.engine,
            str(self.model_dir),
            dtype=self.config.dtype,
            batch_tokens=self.config.rollout_tokens,
            max_length=max(map(len, self.world.ids)) + self.config.max_new_tokens,
            end_of_turn=self.world.renderer.end_of_turn,
            adapter=str(self._saved()) if self.config.lora else None,
        )

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
        places = sorted(set(of.places))
        seeds = [_seed(self.config, of.number, i) + 1 for i in range(len(places))]
        found = dict(zip(places, self._sample(places, self.config.reference_samples, seeds), strict=True))
        rewards = {}
        for place, sampled in found.items():
            these = Round(
                of.number, [place] * len(sampled), sampled, [self.world.renderer.words(s.ids) for s in sampled]
            )
            rewarded(these, self.world, reward, None, dataclasses.replace(self.config, missing_eos="penalize"))
            rewards[place] = np.nan_to_num(these.rewards, nan=self.config.penalty)
        return [rewards[place] for place in of.places]


def _seed(config: OnlineConfig, number: int, i: int) -> int:
    """What the samples to the i-th prompt of a round depend on."""
    return int(np.random.SeedSequence([config.seed, number, i]).generate_state(1)[0]) * 2


# --- rewards -----------------------------------------------------------------------------------


def rewarded(of: Round, world: World, reward: Rewards, held_out: Rewards | None, config: OnlineConfig) -> None:
    """Fill in raw scores, rewards, and what was decided about which response."""
    n = len(of.places)
    of.why, of.raw, of.held_out = [None] * n, np.full(n, np.nan), np.full(n, np.nan)
    for i, (text, sampled) in enumerate(zip(of.responses, of.sampled, strict=True)):
        if not text.strip():
            of.why[i] = "blank: penalised"
        elif not sampled.finished and config.missing_eos != "keep":
            of.why[i] = "no end: penalised" if config.missing_eos == "penalize" else "no end: left out"
    open_ = [i for i, why in enumerate(of.why) if why is None]
    items = world.items([of.places[i] for i in open_], [of.responses[i] for i in open_])
    for i, score in zip(open_, reward.raw(items), strict=True):
        if isinstance(score, Reject):
            of.why[i] = f"{score.reason}: {score.detail}"
        else:
            of.raw[i] = score
    _check_rewarded(of, config)
    of.rewards = reward.calibrated(of.raw) if np.isfinite(of.raw).any() else of.raw.copy()
    of.rewards[[i for i, why in enumerate(of.why) if why and why.endswith("penalised")]] = config.penalty
    if held_out and open_:
        raw = np.array([np.nan if isinstance(s, Reject) else s for s in held_out.raw(items)])
        of.held_out[open_] = held_out.calibrated(raw)


def _check_rewarded(of: Round, config: OnlineConfig) -> None:
    """`UserError` when too many responses got no score; the samples stay, for when the labeller is mended."""
    lost = [why for why in of.why if why and not why.endswith(("penalised", "left out"))]
    if len(lost) > config.max_unrewarded * len(of.why):
        raise UserError(
            f"round {of.number}: {len(lost)} of {len(of.why)} responses got no score, more than max_unrewarded="
            f"{config.max_unrewarded:g}; the first: {lost[0]}"
        )


# --- what is trained on ------------------------------------------------------------------------


@dataclass(frozen=True)
class Mixed:
    """A round's rows; the fresh ones come first."""

    split: Split
    replayed: int  # groups of earlier rounds
    offline: int  # groups of the offline dataset


def mixed(fresh: Split, earlier: list[Split], offline: Split | None, number: int, config: OnlineConfig) -> Mixed:
    """The fresh groups, with as many of earlier rounds and of the offline dataset as make up their shares."""
    total = len(fresh.group_rows) / (1 - config.replay_ratio - config.offline_ratio)
    parts, counts = [fresh], [0, 0]
    old = data.joined(earlier) if earlier and config.replay_ratio else None
    for i, (split, share, what) in enumerate(
        ((old, config.replay_ratio, REPLAY), (offline, config.offline_ratio, OFFLINE))
    ):
        if split is not None and share:
            part = data.taken(split, _some(split, round(total * share), _rng(config, number, what)))
            parts.append(part)
            counts[i] = len(part.group_rows)
    return Mixed(data.joined(parts) if len(parts) > 1 else fresh, *counts)


def _some(split: Split, groups: int, rng: np.random.Generator) -> list[int]:
    """Bundles at random, until they hold so many groups; all of them where there are no more."""
    sizes = np.diff(split.bundle_starts)
    order = rng.permutation(len(sizes))
    return order[: int(np.searchsorted(np.cumsum(sizes[order]), groups)) + 1].tolist()


def _rng(config: OnlineConfig, number: int, what: int = 0) -> np.random.Generator:
    return np.random.default_rng([config.seed, number, what])


def _steps_of(config: OnlineConfig, prompts: int) -> int:
    """Steps that a round has, which the learning rate's schedule counts on."""
    groups = prompts * config.samples_per_prompt / (1 - config.replay_ratio - config.offline_ratio)
    return config.epochs * max(1, math.ceil(groups / config.batch_size - 1e-9))


def _nothing_to_learn(fresh: Split, config: OnlineConfig) -> str | None:
    """Why a round's rows cannot teach anything, if so."""
    rewards = fresh.rewards
    if not len(rewards):
        return "no response got a reward"
    compares = config.offset["scalar"] in ("ema", "group_mean")
    if compares and rewards.min() == rewards.max() and rewards[0] in (0, 1):
        return f"all {len(rewards)} rewards are {rewards[0]:g}, so none is better than another"
    return None


def _drift(judged: list[Judged], of: Round) -> float | None:
    """Mean of log π_θ(y|x) − log π(y|x) as sampled over the round's own responses when they were trained on, nats."""
    at = rounds.rewarded(of)
    kl = of.kl[at]
    found = [one.logratios[0] - kl[one.rows[0]] for one in judged if one.rows[0] < len(at)]
    return float(np.mean(found)) if found else None


# --- before and after --------------------------------------------------------------------------


def _settings(args: argparse.Namespace, output: Path) -> OnlineConfig:
    config = settings.of_run(settings.load_online, args, output)
    if bool(config.offline_ratio) != bool(args.offline):
        raise UsageError("--offline DIR and offline_ratio go together: which dataset, and which share of the groups")
    required(config)
    return with_dtype(config)


def _offline(dataset: Path | None, config: OnlineConfig) -> Split | None:
    if dataset is None:
        return None
    wants = any(offset in FROM_REFERENCE for offset in config.offset.values())
    split = data.read(dataset, "train", bundle_rows=config.bundle_rows, ref_rewards=wants)
    if split is None or not len(split.rewards):
        raise UserError(f"{dataset}: no rows of split train in data/; give a published dataset")
    return split


def _file(output: Path, number: int) -> Path:
    return output / "rounds" / f"round-{number:06d}.parquet"


def _result(history: list[dict[str, Any]], config: OnlineConfig) -> dict[str, Any]:
    """Reward and KL of the first and of the last rounds."""
    few = max(1, min(config.alarm_rounds, len(history) // 2))
    told: dict[str, Any] = {}
    for name in ("reward", "held_out_reward", "kl", "length"):
        for when, part in (("first", history[:few]), ("last", history[-few:])):
            values = [one[name] for one in part if one[name] is not None]
            told[f"{name}_{when}"] = round(math.fsum(values) / len(values), 6) if values else None
    return told


def _shown(number: float | None) -> str:
    return "none" if number is None or not math.isfinite(number) else f"{number:.3f}"


def _print_result(final: dict[str, Any], facts: dict[str, Any], output: Path) -> None:
    print(f"trained {facts['optimizer_steps']} steps in {facts['seconds']:.1f} s")
    for name in ("reward", "held_out_reward", "kl", "length"):
        if final[f"{name}_first"] is not None:
            print(
                f"{name.replace('_', ' ')}: {final[f'{name}_first']:.3f} at first, {final[f'{name}_last']:.3f} at last"
            )
    print(f"policy: {output / 'policy'}", flush=True)
