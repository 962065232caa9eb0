"""allfuse plan: say in words what a plan would do and promise, or why it cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
from allfuse.plan import Plan, as_plan, describe, layout


def plan(
    job: Annotated[
        str | None, typer.Argument(help="A job file, or the plan itself when --plan is not given.")
    ] = None,
    plan: PlanOption = None,
    workers: WorkersOption = None,
    settings: SetOption = None,
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
    lines = [*describe(chosen), "", *layout(chosen), *draw_topologies(chosen)]
    facts: dict[str, object] = {}
    if job is not None:
        told, facts = tell_job(Path(job), parse_settings(settings), chosen)
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


def draw_topologies(plan: Plan) -> list[str]:
    """Who sends what to whom, for each axis that names its topology; peers on one host."""
    from allfuse.topology import Layout
    from allfuse.topology.draw import draw

    lines: list[str] = []
    for axis in plan.axes:
        topology = getattr(axis, "topology", None)
        if topology is not None and axis.n > 1:
            head, *phases = draw(topology, Layout.of(axis.n))
            lines += ["", f"{axis.name}: {head}", *phases]
    return lines


def tell_job(
    path: Path, settings: dict[str, str], plan: Plan
) -> tuple[list[str], dict[str, object]]:
    """What the plan means for this job: samples, shares, parameters, bytes."""
    from allfuse.base.tensors import share
    from allfuse.base.units import format_bytes, format_count
    from allfuse.job import load_job
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
    for axis in plan.axes:
        topology = getattr(axis, "topology", None)
        if axis.divides_batch and axis.n > 1:
            from allfuse.topology import Layout, Native

            sent = round((topology or Native()).bytes_per_peer(Layout.of(axis.n), payload))
            lines.append(f"  {axis.name:<11} a fusion sends {format_bytes(sent)} from each worker")
            facts[f"{axis.name}_bytes_per_fusion"] = sent
    return lines, facts
