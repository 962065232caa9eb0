"""allfuse plan: say in words what a plan would do and promise, or why it cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from allfuse.base.errors import UserError
from allfuse.cli.options import (
    DebugOption,
    JsonOption,
    PlanOption,
    SetOption,
    WorkersOption,
    parse_settings,
    print_json,
)
from allfuse.codec import Codec, LossyCodec
from allfuse.plan import Data, Plan, Site, as_plan, describe, layout
from allfuse.topology import Layout

if TYPE_CHECKING:
    from torch import nn

    from allfuse.job import Job
    from allfuse.split.base import Run
    from allfuse.split.data import Source, Stream


def plan(
    job: Annotated[
        str | None, typer.Argument(help="A job file, or the plan itself when --plan is not given.")
    ] = None,
    plan: PlanOption = None,
    workers: WorkersOption = None,
    settings: SetOption = None,
    hosts: Annotated[
        int,
        typer.Option(min=1, help="Draw topologies, and count bytes, for workers on so many hosts."),
    ] = 1,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Say in words what a plan would do and promise, or why it cannot be. Starts nothing.

    allfuse plan examples/digits.py --plan "data(2)"
    """
    if plan is not None and workers is not None:
        raise UserError(f"--plan {plan!r} and --workers {workers}: allowed: one of the two")
    if job is not None and not job.endswith(".py") and not Path(job).exists():
        if plan is not None or workers is not None:
            other = f"--plan {plan!r}" if plan is not None else f"--workers {workers}"
            raise UserError(
                f"{job} and {other}: allowed: a job file (.py), and one plan; next: leave one out"
            )
        job, plan = None, job
    text = f"data({workers})" if workers is not None else plan
    if text is None:
        raise UserError('no plan was given; next: allfuse plan JOB --plan "data(2)"')
    chosen = as_plan(text)
    if hosts > chosen.workers:
        raise UserError(
            f"--hosts {hosts}: {chosen} has {chosen.workers} workers; allowed: from 1 to "
            f"{chosen.workers} hosts"
        )
    lines = [*describe(chosen), "", *layout(chosen), *draw_topologies(chosen, hosts)]
    facts: dict[str, object] = {}
    if job is not None:
        told, facts = tell_job(Path(job), parse_settings(settings), chosen, hosts)
        lines += ["", *told]
    if not as_json:
        print("\n".join(lines), flush=True)
    chosen.validate_executable()
    if as_json:
        print_json(
            {
                "ok": True,
                "command": "plan",
                "plan": str(chosen),
                "workers": chosen.workers,
                "promise": chosen.promise,
                "form": chosen.to_nest(),
                "job": facts,
            }
        )


def draw_topologies(plan: Plan, hosts: int) -> list[str]:
    """Who sends what to whom, for each axis that names its topology."""
    from allfuse.topology.draw import draw

    lines: list[str] = []
    for axis in plan.axes:
        if isinstance(axis, Data | Site) and axis.topology and axis.n > 1 and not axis.has_roles:
            head, *phases = draw(axis.topology, spread(plan, axis, hosts))
            lines += ["", f"{axis.name}: {head}", *phases]
    return lines


def tell_warm(codec: Codec) -> str:
    """From when on a codec is used, where that is not the first round."""
    warm = codec.warm if isinstance(codec, LossyCodec) else 0
    return f", from round {warm + 1} on" if warm else ""


def tell_parts(axis: Data | Site) -> str:
    """In how many parts a fusion goes, where it does not go at once."""
    parts = axis.fragments if isinstance(axis, Site) else 1
    return f", in {parts} parts of about {1 / parts:.0%}" if parts > 1 else ""


def tell_hosts(axis: Data | Site, leaving: list[int], facts: dict[str, object]) -> list[str]:
    """What leaves a host, where there are several: in a fusion, or in a step of all replicas over
    servers, and in a step."""
    from allfuse.base.units import format_bytes

    if len(leaving) == 1:
        return []
    every = axis.every if isinstance(axis, Site) else 1
    facts[f"{axis.name}_bytes_leaving_hosts"] = leaving
    most, text = max(leaving), "nothing leaves a host"
    if most:
        text = f"{format_bytes(most)} leave the busiest host, "
        text += f"{format_bytes(sum(leaving))} all {len(leaving)} together, "
        text += "once, at the end" if every == "end" else "in each step"
        if isinstance(every, int) and every > 1:
            text = text.removesuffix("in each step") + f"every {every} steps: "
            text += f"{format_bytes(round(most / every))} a step"
    if isinstance(every, int):
        facts[f"{axis.name}_bytes_leaving_hosts_per_step"] = [n / every for n in leaving]
    return [f"  {axis.name:<11} {text}"]


def spread(plan: Plan, axis: Data | Site, hosts: int) -> Layout:
    """Rank 0 and its peers on an axis, where ranks fill so many hosts evenly, in order."""
    peers = plan.peers(0, axis.name)
    return Layout(tuple(str(rank * hosts // plan.workers) for rank in peers))


def tell_job(
    path: Path, settings: dict[str, str], plan: Plan, hosts: int
) -> tuple[list[str], dict[str, object]]:
    """What the plan means for this job: samples, shares, parameters, bytes."""
    from allfuse.base.tensors import share
    from allfuse.base.units import format_bytes, format_count
    from allfuse.jobfile import load_job
    from allfuse.plan.traffic import leaving_hosts, leaving_in_pairs, leaving_to_servers
    from allfuse.split.data import as_source
    from allfuse.training.start import build_model

    job = load_job(path, settings)
    source = as_source(job.train, collate=job.collate)
    model = build_model(job.model, job.seed)
    if job.batch_size is None:
        text = "the data's own sampler decides the batches; shares are as even as they can be"
        return [f"For {path}:", f"  data        {text}"], {}
    if job.batch_size < plan.replicas:
        raise UserError(
            f"batch_size={job.batch_size}: {plan} has {plan.replicas} replicas that share each "
            f"batch; allowed: a batch_size of at least {plan.replicas}, or fewer workers"
        )
    bounds = [share(job.batch_size, plan.replicas, index) for index in range(plan.replicas)]
    shares = [stop - start for start, stop in bounds]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    payload = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    batches = None if source.size is None else -(-source.size // job.batch_size)
    samples = "an unknown number of" if source.size is None else format_count(source.size)
    lines = [
        f"For {path}:",
        f"  data        {samples} samples, batches of {job.batch_size}"
        + ("" if batches is None else f", {format_count(batches)} steps an epoch"),
        f"  shares      {' + '.join(map(str, shares))} samples of each batch",
        f"  model       {format_count(parameters)} parameters, "
        f"{format_bytes(payload)} of gradients",
    ]
    facts: dict[str, object] = {
        "samples": source.size,
        "batch_size": job.batch_size,
        "steps_per_epoch": batches,
        "shares": shares,
        "parameters": parameters,
        "gradient_bytes": payload,
    }
    shapes = [tuple(p.shape) for p in model.parameters() if p.requires_grad]
    for axis in plan.axes:
        if isinstance(axis, Data | Site) and axis.n > 1:
            from allfuse.fusion import choose

            fusion, _ = choose(axis.rule, axis.topology, axis.sync, axis.codec, axis.n)
            encoded = payload
            if not fusion.codec.lossless:
                encoded = fusion.codec.payload_bytes(shapes, 4)
                share_of = encoded / max(payload, 1)
                lines.append(
                    f"  {axis.name:<11} {fusion.codec} makes {format_bytes(encoded)} of "
                    f"{format_bytes(payload)}, {share_of:.1%}{tell_warm(fusion.codec)}"
                )
            if axis is plan.outer and plan.gossips:
                lines.append(
                    f"  {axis.name:<11} each exchange sends {format_bytes(encoded)} to a partner, "
                    "and as much back"
                )
                facts[f"{axis.name}_bytes_per_exchange"] = 2 * encoded
                lines += tell_hosts(axis, leaving_in_pairs(plan, encoded, hosts), facts)
                continue
            if axis.has_roles:
                lines.append(
                    f"  {axis.name:<11} each update pushes {format_bytes(encoded)} and pulls as "
                    f"much, for each replica{tell_parts(axis)}"
                )
                facts[f"{axis.name}_bytes_per_update"] = 2 * encoded
                lines += tell_hosts(axis, leaving_to_servers(plan, encoded, hosts), facts)
                continue
            sent = round(fusion.topology.bytes_per_peer(spread(plan, axis, hosts), encoded))
            lines.append(
                f"  {axis.name:<11} a fusion over {fusion.topology} sends {format_bytes(sent)} "
                f"from the busiest worker{tell_parts(axis)}"
            )
            facts[f"{axis.name}_bytes_per_fusion"] = sent
            leaving = leaving_hosts(plan, axis, fusion.topology, encoded, hosts)
            lines += tell_hosts(axis, leaving, facts)
    told, found = tell_splits(job, source, model, plan)
    return lines + told, {**facts, **found}


def tell_splits(
    job: Job, source: Source | Stream, model: nn.Module, plan: Plan
) -> tuple[list[str], dict[str, object]]:
    """How the axes of a plan that cut a model cut this one."""
    import torch
    from torch import nn

    from allfuse.job import default_forward
    from allfuse.split.describe import describe_splits
    from allfuse.training.loop import settings_of
    from allfuse.training.parting import refuse_few, refuse_settings, run_on, runs_on

    if plan.replica_size == 1 or job.batch_size is None:
        return [], {}
    settings = settings_of(job, None)
    has_norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    refuse_settings(plan, settings, has_norms)
    refuse_few(plan, job.batch_size, settings.accumulate)
    runs = runs_on(plan, source, job.forward or default_forward, torch.device("cpu"))
    rows = -(-job.batch_size // plan.replicas)

    def run(count: int) -> Run:
        return run_on(source, job.forward or default_forward, torch.device("cpu"), count)

    return describe_splits(plan, model, runs, rows, job.request, run)
