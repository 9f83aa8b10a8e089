"""The training loop, one for every method; what is patched in libraries is in drdpo.training.patches.

In order: signals; opening a run; one optimizer step; evaluation; the loop, its checkpoints and its end; the reference.
"""

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from drdpo import distributed
from drdpo.candidates import ROW_TOKENS, Candidates, values
from drdpo.cli import as_dict
from drdpo.config.training import TrainConfig
from drdpo.errors import STOPPED, ProcessError
from drdpo.folder import atomic_file, sole_writer, whole_lines
from drdpo.machine import Precision, agree, announce, settle
from drdpo.progress import progress
from drdpo.training import engine as deepspeed_engine
from drdpo.training.checkpoint import load_state, remove_old_checkpoints, save_model, save_state
from drdpo.training.data import AnyBatch, BatchPlan, columns_of
from drdpo.training.engine import Engine, evaluating
from drdpo.training.log import (
    MetricsLog,
    Shape,
    check_evaluation,
    check_first_step,
    check_step,
    on_the_bar,
    pair_table,
    step_metrics,
    summary,
    table_means,
    throughput,
)
from drdpo.training.lora import add_lora
from drdpo.training.losses import Method
from drdpo.training.memory import preflight, resolve_attention, resolve_rows
from drdpo.training.model_card import model_card, push_to_hub
from drdpo.training.objective import Objective, check_tangent, objective, penalty_scales, survey
from drdpo.training.policy import FiniteWatch, load_policy, pairs_of, set_recomputation, widen_values
from drdpo.training.reference import candidate_logprobs, reference_key, reference_logprobs, stored_logprobs
from drdpo.training.run import CANDIDATES, Run, arithmetic_of, claim_folder, is_complete, is_saved, note_run, open_run

Stop = Callable[[torch.device], str | None]
"""Name of the signal that any rank was sent, the same answer on every rank; every rank must call."""


@contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """Record SIGTERM and SIGUSR1, and those that arrived while src/train_alignment.py blocked them; `_steps` asks before
    every step whether to end the run. Main thread only."""
    sent, signals = [0], (signal.SIGTERM, signal.SIGUSR1)

    def agreed(device: torch.device) -> str | None:
        asked = int(distributed.gather(torch.tensor(sent[-1:], device=device)).max())
        return signal.Signals(asked).name if asked else None

    before = {number: signal.signal(number, lambda number, frame: sent.append(number)) for number in signals}
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    try:
        yield agreed
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)


def train_alignment(config: TrainConfig, method: Method) -> None:
    """Align a policy on inputs that drdpo.training.run.check_inputs has passed; see TrainConfig for the flags."""
    config, precision = settle(config, kernels=True)
    timeout = distributed.seconds_to_wait()
    with stop_on_signal() as stop, distributed.lost_rank_in_one_line(timeout):
        if config.deterministic:
            deepspeed_engine.be_deterministic()
        if not config.dry_run:
            deepspeed_engine.join_with_deepspeed(timedelta(seconds=timeout))
            config, precision = agree(config, precision)
        announce(precision)
        finished = _align(config, method, stop, precision)
    if finished and config.push_to_hub and distributed.is_main():
        push_to_hub(config.push_to_hub, finished)


def _align(config: TrainConfig, method: Method, stop: Stop, precision: Precision) -> Path | None:
    """The last checkpoint; None after --dry_run."""
    config = resolve_rows(resolve_attention(config), method)
    run = open_run(config, method, precision.reason)
    if is_complete(run):
        if run.candidates is not None:
            distributed.on_main(partial(run.candidates.check_evaluated, run.folder, run.steps), status=2)
        distributed.say(f"{run.folder} is complete: {run.steps} steps, same flags, model and pairs; nothing to do")
        return run.folder / f"global_step_{run.steps}"
    run, shape = preflight(run)
    if config.dry_run:
        return None
    with sole_writer(run.folder):
        distributed.barrier()
        distributed.on_main(partial(claim_folder, run))
        _train(run, shape, stop)
    return run.folder / f"global_step_{run.steps}"


def _train(run: Run, shape: Shape, stop: Stop) -> None:
    """Everything after the checks, in a folder that this run may write."""
    config = run.config
    policy = load_policy(
        config.model_path, getattr(torch, config.dtype), config.attention, False,  # set_recomputation chooses the layers
        config.second_derivative, config.lora_quantize,
    )  # fmt: skip
    set_recomputation(policy.language_model, run.recompute)
    if config.lora:
        add_lora(policy, config.lora)
    if config.tangent:
        if config.wide_values:
            widen_values(policy)
        check_tangent(policy, config.model_path, run.method)
    engine = deepspeed_engine.start_engine(policy, config, run.steps)
    engine.module.flash_attention = config.packed_flash
    references = {split: _reference(engine, run, split) for split in ("train", "test")}
    if run.candidates is not None:
        references[CANDIDATES] = _candidate_reference(engine, run, run.candidates)
    if run.method.begin:
        kept = run.method.begin(columns_of(run.train))
        engine.module.method_state = {name: value.to(engine.device) for name, value in kept.items()}
    done = load_state(engine, run.folder / "resume")
    if done:
        distributed.say(f"continuing after step {done} of {run.steps}")
    log = MetricsLog(run.folder, done, config.trackers, as_dict(config))
    try:
        _steps(engine, run, shape, references, done, log, stop)
    finally:
        log.close()
    if not is_saved(run.folder / f"global_step_{run.steps}"):
        _save(engine, run, dict([line for _, line in whole_lines(run.folder / "metrics.jsonl")][-1]))
    if distributed.is_main():
        note_run(run, complete=True)
        print(summary(run.folder, run.method.name, config.train_batch_size), flush=True)


def train_step(
    engine: Engine, batches: list[tuple[AnyBatch, Tensor]], config: TrainConfig, method: Method, step: int = 0
) -> list[Objective]:
    """One optimizer step, after `step` others, on this rank's micro-batches with their reference log-probs [B, 2], as many
    as every other rank's: over the ranks config.train_batch_size pairs, any number of them in each. Returns what every
    micro-batch contributed, detached from its graph."""
    population = None  # With one micro-batch, `objective` gathers its losses over the ranks, without another pass.
    if method.needs_population and config.robust_scope == "step" and len(batches) > 1:
        population = survey(engine.module, batches, method)
    # The bare module, or DeepSpeed mistakes the inner gradient of WDPO's exact solver for the backward pass. ZeRO-3, which
    # that solver cannot use, counts micro-batches in the engine's own forward: without that call, each would replace the
    # gradients of the one before.
    policy = engine if config.zero_stage == 3 else engine.module
    watch = engine.module.watch = FiniteWatch(engine.device)
    parts = []
    scales = penalty_scales(len(batches), method.penalty.fraction if method.penalty else 1.0, config.seed, step)
    for number, (batch, reference_B2) in enumerate(batches, start=1):
        watch.next_batch()
        # Micro-batches count by their pairs; DeepSpeed takes the mean over the ranks.
        share = len(batch.indices_B) * distributed.world_size() / config.train_batch_size
        part = objective(policy, batch, reference_B2, method, population, scales[number - 1], share)
        watch.look(part.total)
        engine.set_gradient_accumulation_boundary(number == len(batches))
        engine.backward(part.total, scale_wrt_gas=False)
        engine.step()
        parts.append(part.detached())
    if method.update:
        engine.module.method_state = parts[-1].state  # the same in all
    return parts


def evaluate(engine: Engine, run: Run, reference_M2: Tensor, step: int) -> dict[str, float]:
    """Plain, unweighted loss, accuracy and rewards on all test pairs, and loss and accuracy on their shifted populations,
    after so many steps; DataError as check_evaluation. Every rank must call."""
    plan, tables = run.plans["test"], []
    shards = plan.without_steps()
    with evaluating(engine) as policy:
        for indices in progress(shards, desc="evaluate", unit="batch", leave=False, disable=not distributed.is_main()):
            batch, reference_B2 = _on_device(engine, plan, indices, reference_M2)
            pairs = pairs_of(policy(batch).logprob_S, reference_B2, batch)
            table_B4 = pair_table(run.method.loss(pairs), pairs, run.config.beta)
            shifted_BC = run.shifts.table(run.method.loss, pairs, batch.indices_B)
            tables.append(torch.cat([batch.indices_B[:, None].float(), table_B4, shifted_BC], dim=1))
    table_KC = distributed.gather(torch.cat(tables)).cpu()
    table_KC = table_KC[table_KC[:, 0] >= 0]
    shifted = run.shifts.metrics(table_KC[:, 0].long(), table_KC[:, 1:3], table_KC[:, 5:])
    metrics = {f"eval_{name}": value for name, value in (table_means(table_KC[:, 1:5]) | shifted).items()}
    check_evaluation(metrics, step)
    distributed.on_main(partial(note_pairs, run, table_KC[:, :5]))
    return metrics


def note_pairs(run: Run, table_K5: Tensor) -> None:
    """Replace eval_pairs.json by this evaluation's test pairs, in their order: [K, 5] place, then columns of pair_table."""
    place_K, loss_K, _, chosen_K, rejected_K = (column.tolist() for column in table_K5[table_K5[:, 0].argsort()].T)
    ids = [run.test[int(place)].prompt_id for place in place_K]
    with atomic_file(run.folder / "eval_pairs.json") as stream:
        json.dump({"prompt_id": ids, "loss": loss_K, "chosen_reward": chosen_K, "rejected_reward": rejected_K}, stream)


def expected_scores(engine: Engine, run: Run, candidates: Candidates, reference_C: Tensor, step: int) -> dict[str, float]:
    """The policy's expected scores on --eval_candidates by objective and mixture, and the mean effective sample size, after
    so many steps; the log-ratios to the starting model's log-probs [C], at step 0 zero, go to
    candidates/step_<n>.safetensors. Every rank must call."""
    logprobs_C = reference_C
    if step:
        logprobs_C = candidate_logprobs(engine, candidates, _row_tokens(run.config), "evaluate candidates")
    log_ratio_NK = candidates.table((logprobs_C - reference_C).numpy())
    path = run.folder / CANDIDATES / f"step_{step}.safetensors"
    distributed.on_main(partial(candidates.write, path, log_ratio_NK, step))
    values_NO, sizes_N = values(log_ratio_NK, candidates.scores_NKO)
    found = {f"value.{name}": value for name, value in zip(candidates.names, values_NO.mean(axis=0), strict=True)}
    return {f"eval_{name}": float(value) for name, value in {**found, "candidates_ess": sizes_N.mean()}.items()}


def _steps(
    engine: Engine, run: Run, shape: Shape, references: dict[str, Tensor], done: int, log: MetricsLog, stop: Stop
) -> None:
    """All steps that are left after `done`, with their metrics, evaluations, checkpoints and states; a signal ends them."""
    config, plan, saved = run.config, run.plans["train"], done
    bar = progress(range(done, run.steps), initial=done, total=run.steps, desc=run.method.name, unit="step",
               disable=not distributed.is_main())  # fmt: skip
    for step in bar:
        if (signal_name := stop(engine.device)) is not None:
            _stop(engine, run, step, saved, log, signal_name)
        started = time.perf_counter()
        batches = [_on_device(engine, plan, indices, references["train"]) for indices in plan.of_step(step)]
        learning_rate = engine.optimizer.param_groups[0]["lr"]
        parts = train_step(engine, batches, config, run.method, step)
        metrics = {"step": step + 1, "epoch": run.epochs(step + 1)}
        penalty = run.method.penalty
        root = config.robust_scope if penalty and penalty.root else None
        metrics |= step_metrics(parts, config.beta, run.method.weighted, penalty.rho if penalty else None, root)
        metrics["lr"], metrics["grad_norm"] = learning_rate, float(engine.get_global_grad_norm() or 0.0)
        seconds = time.perf_counter() - started
        metrics |= throughput([batch for batch, _ in batches], shape, config.dtype, config.train_batch_size, seconds)
        check_step(metrics, engine.module.watch, [batch.indices_B for batch, _ in batches], run.train)
        if step == 0:
            references_B2 = [reference_B2 for _, reference_B2 in batches]
            stored = str(run.folder / "reference_train.safetensors")
            check_first_step(parts, references_B2, run.method, config.dtype, config.model_path, stored)
        last = step + 1 == run.steps
        if last or (config.eval_steps and (step + 1) % config.eval_steps == 0):
            metrics.update(evaluate(engine, run, references["test"], step + 1))
            if run.candidates is not None:
                metrics.update(expected_scores(engine, run, run.candidates, references[CANDIDATES], step + 1))
        distributed.on_main(partial(log.write, metrics))
        bar.set_postfix(on_the_bar(metrics), refresh=False)
        if last or (config.save_steps and (step + 1) % config.save_steps == 0):
            distributed.on_main(log.flush)
            _save(engine, run, metrics)
            if config.save_resume:
                save_state(engine, run.folder / "resume", step + 1)
                saved = step + 1
            distributed.on_main(lambda: remove_old_checkpoints(run.folder, config.keep_checkpoints))


def _save(engine: Engine, run: Run, metrics: dict[str, float]) -> None:
    """The checkpoint of the step that has these metrics, with its model card."""
    step = int(metrics["step"])
    card = model_card(run, step, metrics) if distributed.is_main() else ""
    save_model(engine, run.tokenizer, run.folder / f"global_step_{step}", run.config.lora, card)


def _stop(engine: Engine, run: Run, step: int, saved: int, log: MetricsLog, signal_name: str) -> NoReturn:
    """End a run that was sent a signal, after `step` steps, of which the newest state holds `saved`: with status STOPPED, or
    by ProcessError if --save_resume=false."""
    if not run.config.save_resume:
        raise ProcessError(
            f"stopped by {signal_name} after step {step} of {run.steps}; --save_resume=false keeps no state of it"
        )
    if step > saved:
        distributed.on_main(log.flush)
        save_state(engine, run.folder / "resume", step)
    what = f"after step {step} of {run.steps}, state saved; rerun the same command to resume" if step else (
        "before the first step; rerun the same command to start"
    )  # fmt: skip
    distributed.say(f"stopped by {signal_name} {what}")
    # torchrun ends the others when the first one has ended.
    distributed.barrier()
    sys.exit(STOPPED)


def _reference(engine: Engine, run: Run, split: str) -> Tensor:
    """[M, 2] log-probs of a split's pairs under the untrained policy, stored or computed, before any state is loaded."""
    plan, pairs = run.plans[split], getattr(run, split)
    key = reference_key(run.made_by["model"], pairs, arithmetic_of(run.config))
    batches = plan.of_first_epoch() if split == "train" else plan.without_steps()
    return stored_logprobs(
        run.folder / f"reference_{split}.safetensors", key, (len(pairs), 2),
        lambda: reference_logprobs(engine, plan, batches, split), f"the reference model on the {split} pairs",
    )  # fmt: skip


def _candidate_reference(engine: Engine, run: Run, candidates: Candidates) -> Tensor:
    """[C] log-probs of the candidates under the starting model, before any state is loaded."""
    tokens = _row_tokens(run.config)
    key = reference_key(run.made_by["model"], [], f"{arithmetic_of(run.config)} {candidates.key} in rows of {tokens}")
    logprobs_C = stored_logprobs(
        run.folder / f"reference_{CANDIDATES}.safetensors", key, (len(candidates.places),),
        lambda: candidate_logprobs(engine, candidates, tokens, f"reference log-probs, {CANDIDATES}"),
        f"the starting model on {candidates.path}",
    )  # fmt: skip
    distributed.on_main(partial(candidates.remove_others, run.folder / CANDIDATES))
    start = expected_scores(engine, run, candidates, logprobs_C, 0)
    shown = ", ".join(f"{name.removeprefix('eval_value.')} {value:.4g}" for name, value in start.items() if "value" in name)
    note = f"\n{candidates.path}: {candidates.note}" if candidates.note else ""
    distributed.say(
        f"{candidates.path}: {len(candidates.places)} candidates of {len(candidates.prompts)} prompts; mean {shown}{note}"
    )
    return logprobs_C


def _row_tokens(config: TrainConfig) -> int:
    """Largest row of candidates: no more than a micro-batch of training, whose memory was predicted."""
    return config.micro_batch_tokens or min(ROW_TOKENS, 2 * config.micro_batch * config.max_len)


def _on_device(engine: Engine, plan: BatchPlan, indices: list[int], reference_M2: Tensor) -> tuple[AnyBatch, Tensor]:
    batch = plan.batch(indices)
    return batch.to(engine.device), distributed.send(reference_M2[batch.indices_B], engine.device)
