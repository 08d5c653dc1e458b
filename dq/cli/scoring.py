"""`dq evaluate` on sets of any origin, rather than on those of a run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from dq.cli.jobs import Call, Checked, Job
from dq.core.errors import InputError
from dq.core.plain import PlainDict

if TYPE_CHECKING:
    from dq.distilled.set import DistilledSet


def scores_sets(args: argparse.Namespace) -> bool:
    """Whether `evaluate` scores sets of any origin, rather than those of a run."""
    return bool(args.distilled or not args.config or args.protocol == "ddr")


def check(call: Call) -> Checked:
    """Check the evaluation, and open the sets named with --distilled."""
    from dq.core.files import check_place
    from dq.evaluation.dd_ranking import check_ddr
    from dq.evaluation.evaluate import EvaluationSettings, check_sets
    from dq.run.checks import check_teachers
    from dq.run.folder import holds_work

    args, config, source = call.args, call.config, call.source
    if args.protocol == "ddr" and (args.ipc or not args.distilled):
        raise InputError("ddr scores sets named with --distilled PATH, against as many random images; leave --ipc out")
    if (Path(config.output_dir) / "config.yaml").is_file() and holds_work(Path(config.output_dir)):
        raise InputError(f"{config.output_dir} is a run, whose results would be replaced; choose another --output_dir")
    check_place(config.output_dir, "output_dir")
    check_place(config.cache_dir, "cache_dir", reads=True)
    if not args.distilled and not args.ipc:
        raise InputError(
            "name the sets to score with --distilled PATH, or a run with --config FILE, or say by --ipc for how many "
            "images per class baselines are to be measured"
        )
    sets = _read_sets(call)
    if args.protocol == "ddr":
        side = check_ddr(sets, source, EvaluationSettings(**_options(call)))
    else:
        settings = EvaluationSettings(**_options(call), ipcs=_ipcs(call), difficulty=config.prune)
        side = check_sets(sets, source, settings)[0]
    check_teachers(config.teachers, len(source.class_names), side)
    return Checked(sets=sets)


def _options(call: Call) -> PlainDict:
    config = call.config
    return {"config": config.evaluate, "teachers": config.teachers, "image_size": config.source.image_size}


def _ipcs(call: Call) -> tuple[int, ...]:
    """Images per class for which baselines are measured beside those of the sets."""
    return call.config.ipc if call.args.ipc else ()


def _read_sets(call: Call) -> dict[str, DistilledSet]:
    from dq.core.files import is_same_folder
    from dq.distilled.external import load_set

    args, config, source = call.args, call.config, call.source
    sets: dict[str, DistilledSet] = {}
    for text in args.distilled:
        name, sep, path = text.partition("=")
        path = path if sep else text
        name = name if sep else (Path(path).stem if Path(path).suffix else Path(path).name)
        if name in sets:
            raise InputError(f"two sets are called {name!r}; name them with --distilled NAME=PATH")
        if is_same_folder(path, config.output_dir):
            raise InputError(f"{config.output_dir} is the set {name!r} itself; choose another --output_dir")
        sets[name] = load_set(
            path,
            source.class_names,
            image_size=config.source.image_size,
            label_kind=args.label_kind,
            on_bad_image=source.on_bad_image,
        )
    return sets


def plan(call: Call, checked: Checked) -> str:
    from dq.core.text import plural
    from dq.evaluation.dd_ranking import count_trainings
    from dq.run.planning.plan import plan_evaluation

    if call.args.protocol == "ddr":
        e = call.config.evaluate
        number = count_trainings(len(checked.sets), len(e.students), e.seeds)
        return f"evaluate    up to {plural(number, 'training')} of ddr"
    sizes = {(name, str(s.ipc)): len(s) for name, s in checked.sets.items()}
    counts, sides = call.source.class_counts(), [s.images.shape[-1] for s in checked.sets.values()]
    side = call.config.source.image_size or max(sides, default=call.config.image_size)
    return "\n".join(plan_evaluation(call.config, counts, sizes, _ipcs(call), side=side))


def work(call: Call, checked: Checked) -> None:
    """Evaluate the sets, and print the table."""
    from dq.config.reader import dump_config, to_dict
    from dq.core.files import write_text
    from dq.core.trackers import start_trackers
    from dq.evaluation.dd_ranking import evaluate_ddr
    from dq.evaluation.evaluate import evaluate_sets
    from dq.evaluation.tables import tables_text

    config, accelerator = call.config, call.accelerator
    start_trackers(accelerator, config.report_to, to_dict(config), Path(config.output_dir))
    options = {
        **_options(call),
        "folder": Path(config.output_dir),
        "cache_dir": Path(config.cache_dir),
        "accelerator": accelerator,
        "difficulty": config.prune,
    }
    if call.args.ipc:
        options["ipcs"] = config.ipc
    if call.args.protocol == "ddr":
        text, file = str(evaluate_ddr(checked.sets, call.source, **options)), "ddr.csv"
    else:
        text, file = tables_text(evaluate_sets(checked.sets, call.source, **options)), "summary.csv"
    if accelerator.is_main_process:
        write_text(Path(config.output_dir) / "eval" / "config.yaml", dump_config(config))
        print(text)
        print(Path(config.output_dir) / "eval" / file)


SCORING = Job(check, plan, work)
