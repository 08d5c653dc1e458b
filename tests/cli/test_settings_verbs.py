"""The verbs config, validate, ls and cp; options and help of all verbs; the time that they take."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import yaml

from dq.cli.flags import resolve
from dq.cli.main import main
from dq.cli.options import GROUPS, LABEL_KINDS
from dq.cli.parser import build_parser
from dq.cli.verbs import VERBS
from dq.config.networks import NETWORKS, NORM_ENDINGS
from dq.config.protocols import list_protocols
from dq.config.reference import explain, reference, setting_names
from dq.config.refinement import FADRM_PRESETS
from dq.config.schema import PRESETS_FOLDER, RunConfig, load_config
from dq.config.students import LabelKind
from dq.core.errors import InputError
from dq.networks.zoo import RECIPES, SUFFIXES
from dq.refine.fadrm import PRESETS
from dq.refine.registry import METHODS

ROOT = Path(__file__).parents[2]
SHARE = 0.35  # of the CPU time that `import torch` takes here, for help and what prints settings


def cpu_seconds(command: list[str], folder: Path) -> tuple[float, str]:
    """CPU time of a command, and what it wrote to standard error."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stderr


@pytest.fixture(scope="module")
def torch_seconds(tmp_path_factory: pytest.TempPathFactory) -> float:
    return cpu_seconds([sys.executable, "-c", "import torch"], tmp_path_factory.mktemp("torch"))[0]


def called(*args: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    try:
        code = main(list(args))
    except SystemExit as e:
        code = int(e.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["run", "--help"],
        ["evaluate", "--help"],
        ["config"],
        ["config", "cluster.n_iter"],
        ["validate", "cifar10_ddoq"],
        ["validate", "no_such_file"],
        ["runn"],
    ],
)
def test_help_and_settings_are_printed_without_torch(args: list[str], tmp_path: Path, torch_seconds: float) -> None:
    code = (
        "import sys\nfrom dq.cli.main import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'numpy', 'diffusers', 'datasets', 'matplotlib', 'sklearn', 'scipy'} & set(sys.modules)\n"
        "print('heavy', sorted(heavy), file=sys.stderr)"
    )
    times = []
    for _ in range(3):  # the least, since another process may have made one slow
        seconds, err = cpu_seconds([sys.executable, "-c", code, *args], tmp_path)
        assert err.endswith("heavy []\n"), err
        times.append(seconds)
        if min(times) < SHARE * torch_seconds:
            break
    assert min(times) < SHARE * torch_seconds


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_one_example_that_parses(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = called(verb, "--help", capsys=capsys)
    examples = [line for line in out.splitlines() if line.startswith("example: ")]
    assert code == 0
    assert len(examples) == 1
    words = examples[0].removeprefix("example: dq ").split()
    assert words[0] == verb
    assert build_parser().parse_args(words).verb == verb


@pytest.mark.parametrize("verb", VERBS)
def test_settings_that_help_names_exist(verb: str) -> None:
    text = VERBS[verb].settings.partition(";")[0]
    for name in text.split():
        assert explain(name), (verb, name)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["runn", "--config", "demo"], "dq: there is no verb 'runn'; did you mean 'run'?"),
        (["evalaute"], "there is no verb 'evalaute'; did you mean 'evaluate'?"),
        (["run", "--confg", "x"], "dq run: there is no option --confg; did you mean --config?"),
        (["run", "--config", "x", "--outputdir=y"], "there is no option --outputdir; did you mean --output"),
        (["pull", "a/b", "--ipc", "3"], "dq pull: --ipc is not read, but by cluster, demo, "),
        (["doctor", "--processes", "3"], "dq doctor: --processes is not read, but by "),
        (["doctor", "--dry-run"], "dq doctor: --dry-run is not read, but by "),
        (["push", "a", "--cpu"], "dq push: --cpu is not read, but by "),
        (["train-teachers", "--report_to", "trackio"], "dq train-teachers: --report_to is not read, but by "),
        (["train-pool", "--speeds", "x"], "--speeds is not read, but by "),
        (["run"], "dq run: the following arguments are required: --config"),
        (["ls", "x"], "dq ls: there is no place for the argument 'x'"),
        (
            ["run", "--ipc", "1", "--config", "x", "--ipc", "10"],
            "dq run: --ipc is given twice, as 1 and 10",
        ),
        (["run", "--config", "x", "--seed=3", "--seed=4"], "dq run: --seed is given twice, as 3 and 4"),
        (["push", "a", "--repo_id", "b", "--hub-model-id", "c"], "--hub-model-id is given twice, as b and c"),
        (["validate", "."], "dq validate: . is a folder; give the YAML file"),
        (["validate", "no/such.yaml"], "dq validate: there is no configuration file no/such.yaml"),
    ],
)
def test_wrong_verbs_and_options_are_named(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = called(*args, capsys=capsys)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "setting"), [(["--ipc", "1"], "ipc=2"), (["--data", "a"], "source.path=b"), (["--seed", "1"], "seed=1")]
)
def test_a_setting_given_by_an_option_and_by_set_is_refused(option: list[str], setting: str, capsys) -> None:
    code, _, err = called("run", "--config", "demo", *option, "--set", setting, capsys=capsys)
    assert code == 2
    assert f"is given twice, by --set {setting} and by its option" in err


@pytest.mark.parametrize("verb", [v for v in VERBS if not VERBS[v].prints])
def test_options_that_a_verb_lacks_are_absent_and_not_undefined(verb: str) -> None:
    repo = {"pull": ["a/b"], "distill": ["images"], "export": ["set"], "init": ["images", "a.yaml"]}.get(verb, [])
    args = build_parser().parse_args([verb, *repo, *(["--config", "demo"] if VERBS[verb].needs_config else [])])
    if args.config == "demo":
        assert resolve(args) == load_config("demo")
    assert (args.dry_run, args.cpu, args.like, args.processes) == (VERBS[verb].plans, False, None, None)


@pytest.mark.parametrize(
    ("verb", "folder", "seed"),
    [
        ("train-teachers", "train_teachers.output_dir", "train_teachers.seed"),
        ("train-pool", "train_pool.output_dir", "train_teachers.seed"),
        ("train-experts", "train_experts.output_dir", "train_experts.seed"),
        ("train-codec", "prior.output_dir", "prior.seed"),
        ("run", "output_dir", "seed"),
    ],
)
def test_folder_and_seed_are_those_that_the_verb_reads(verb: str, folder: str, seed: str) -> None:
    args = [verb, "--config", "demo", "--output_dir", "here", "--seed", "7"]
    config = resolve(build_parser().parse_args(args))
    for name, value in ((folder, "here"), (seed, 7)):
        node: object = config
        for part in name.split("."):
            node = getattr(node, part)
        assert node == value


def test_tables_agree_with_the_code() -> None:
    assert get_args(LabelKind) == LABEL_KINDS
    assert tuple(PRESETS) == FADRM_PRESETS
    assert tuple(RECIPES) == NETWORKS
    assert tuple(SUFFIXES) == NORM_ENDINGS
    assert {g for v in VERBS.values() for g in v.options.split()} == set(GROUPS)


def test_the_reference_has_every_setting_with_help() -> None:
    keys = {r.key for r in reference()}
    for name in setting_names():
        assert name in keys or any(k.startswith((f"{name}.N.", f"{name}.NAME.")) for k in keys), name
    own = [r for r in reference() if not r.stage or r.stage in METHODS]  # and not of stages that other tests make
    assert not [r.key for r in own if not (r.help and r.type and r.default)]


def test_config_explains_one_setting(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = called("config", "cluster.dims", capsys=capsys)
    assert code == 0
    assert "principal directions" in out
    assert "whole number or auto, at least 1; default auto" in out
    assert called("config", "refine.0.ridge", capsys=capsys)[1].startswith("refine.N.ridge (stage: frepo)\n")
    assert "teachers.N.net" in called("config", "teachers.3.net", capsys=capsys)[1]
    assert "evaluate.students.N.views.flip" in called("config", "evaluate.students.0.views", capsys=capsys)[1]
    assert "methods.NAME.weights" in called("config", "methods.fadrm.weights", capsys=capsys)[1]
    assert "cluster.n_init" in called("config", "n_init", capsys=capsys)[1]  # the last part is enough
    near_names = {"cluster.n_itr": "cluster.n_iter", "n_itr": "cluster.n_iter", "clustr": "cluster"}
    for wrong, near in {**near_names, "prior.codek": "prior.codec", "refin.0.ridge": "refine.N.ridge"}.items():
        code, _, err = called("config", wrong, capsys=capsys)
        assert code == 2
        assert f"did you mean '{near}'" in err
    for old, new in (("teacher", "teachers"), ("generate.guidance_snr", "generate.guidance_interval")):
        code, _, err = called("config", old, capsys=capsys)
        assert code == 2
        assert f"is now called '{new}'" in err
    code, out, _ = called("config", capsys=capsys)
    assert len(out.splitlines()) > 300


def test_config_lists_the_settings_that_contain_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = called("config", "Epoch", capsys=capsys)
    lines = out.splitlines()
    listed = {line.split()[0] for line in lines if " default " in line}
    assert code == 0
    assert listed == {r.key for r in reference() if "epoch" in r.key}
    assert {"prune.score_epoch", "train_teachers.epochs", "evaluate.students.N.epochs"} <= listed
    assert any(line.startswith("no setting is called Epoch; these names contain it") for line in lines)
    code, out, _ = called("config", "clusters", capsys=capsys)  # nothing contains it
    assert (code, out) == (2, "")
    code, out, _ = called("config", "iter", capsys=capsys)
    assert "cluster.n_iter" in out
    # a name that several settings have is explained, and no other that contains it is listed
    code, out, _ = called("config", "epochs", capsys=capsys)
    assert "train_teachers.epochs\n    epochs of the training\n" in out
    assert "recovery_epochs" not in out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cluster: {n_iter: 0}", "cluster.n_iter must be a whole number of at least 1, not 0"),
        (
            "methods: {a: {override: {cluster.n_iter: 1, cluster: {n_iter: 2}}}}",
            "methods.a.override gives cluster.n_iter twice, as 1 and 2",
        ),
        ("evaluate: {students: [{lrr: 1}]}", "unknown setting 'evaluate.students.0.lrr'; did you mean"),
        (
            "evaluate: {students: [{}, {protocol: clasic}]}",
            "evaluate.students.1.protocol: unknown protocol 'clasic'",
        ),
        ("evaluate: {students: [{protocol: ddr}]}", "evaluate.students.0.protocol=ddr is scored by"),
        (
            "evaluate: {students: [{dataset: cifar10}]}",
            "evaluate.students.0.dataset chooses the settings",
        ),
        (
            "evaluate: {students: [{protocol: rd3, dataset: x}]}",
            "evaluate.students.0.dataset: protocol 'rd3' has",
        ),
        ("evaluate: {students: [{epochs: {1: 3}}]}", "evaluate.students.0.epochs has entries for 1 but not for '10'"),
        ("generate: {mode: dit}", "generate.model is missing, but method 'ddoq' has generate.mode=dit"),
        ("methods: {a: {}, b: {override: {generate.mode: img2img}}}", "generate.model is missing, but method 'b'"),
        ("methods: {window: {}}", "the method name 'window' is that of a baseline; call it methods.my-window"),
        (
            "methods: {a: {override: {cluster.enginee: torch}}}",
            "methods.a.override: unknown setting 'cluster.engin",
        ),
        ("methods: {a: {override: {seed: 1}}}", "methods.a.override may set prune.*"),
        ("seed: 1\nseed: 2", "the key 'seed' is given twice, again in line 2"),
        ("a: [1", "is not valid YAML"),
        ("[]", "the configuration must be a mapping of settings, not []"),
        ("methods: {}", "a run needs at least one method"),
        ("methods: {random: {}}", "the method name 'random' is that of a baseline"),
        ("ipc: [5, 5]", "ipc=[5, 5] names a number twice"),
        (
            "generate: {mode: dit, model: x, candidates: 1, select: correct}",
            "has generate.select=correct and one candidate",
        ),
        ("generate: {autoguidance: 2}", "generate.mode=decode has no denoiser to guide"),
        (
            "evaluate: {students: convnett3}",
            "evaluate.students.0.net: no network is called 'convnett3'; nearest: conv",
        ),
        ("teachers: {net: resnet21}", "teachers.0.net: no network is called 'resnet21'; nearest: resnet20"),
        ("refine: {stage: fadrm, teachers: {net: vgg12}}", "refine.0.teachers.0.net: no network is called 'vgg12'"),
        (
            "methods: {a: {override: {prune.net: convnet33}}}",
            "methods.a.override.prune.net: no network is called 'convnet33'",
        ),
    ],
)
def test_validate_names_what_is_wrong(text: str, message: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    code, out, err = called("validate", str(path), capsys=capsys)
    assert (code, out) == (2, "")
    assert message in err


OLD_NAMES = {"teacher", "judges", "mode_guidance", "mode_stop", "guidance_snr", "licence", "neighbours"}


def old_names(data: object, path: str = "") -> Iterator[str]:
    """Paths of settings that have other names now."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        if key in OLD_NAMES:
            yield f"{path}{key}"
        yield from old_names(value, f"{path}{key}.")


@pytest.mark.parametrize("path", sorted((ROOT / "results").rglob("config.yaml")), ids=lambda p: p.parent.name)
def test_a_configuration_beside_results_is_read_or_answered_with_all_new_names(path: Path, capsys) -> None:
    data = yaml.safe_load(path.read_text())
    names = list(old_names(data))
    code, out, err = called("validate", str(path), capsys=capsys)
    assert (code, out) == (2, "") if names or data["cluster"]["init"] == "race" else (0, f"{path}: no errors\n")
    assert err.count("\n") == bool(code)
    assert err.count("is now called") == len(names) + (data["cluster"]["init"] == "race")
    for name in names:
        assert f"{name!r} is now called" in err


def test_every_old_name_and_value_has_its_new_one_in_the_message(tmp_path: Path, capsys) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "teacher: {net: resnet56, path: x}\ngenerate: {mode_stop: 1, guidance_snr: [1, 2]}\ncluster: {init: race}\n"
        "methods: {a: {refine: [{stage: fadrm, judges: []}]}}\nseed: x\n"
    )
    err = called("validate", str(path), capsys=capsys)[2]
    new = ("teachers", "generate.prototype_guidance_stop", "generate.guidance_interval", "pca-multistart")
    for name in (*new, "methods.a.refine.0.validation_teachers"):
        assert f"is now called {name!r}" in err
    assert err.endswith("change the names\n")


def test_ls_says_what_a_protocol_is_without_its_name(capsys) -> None:
    lines = [line.split() for line in called("ls", capsys=capsys)[1].splitlines() if line.startswith("  ")]
    protocols = {words[0]: " ".join(words[1:]).lower() for words in lines if words[0] in list_protocols()}
    assert set(protocols) == set(list_protocols())
    for name, about in protocols.items():
        assert not about.startswith(f"{name}:")


def test_validate_says_what_a_protocol_is(capsys) -> None:
    code, _, err = called("validate", "classic", capsys=capsys)
    assert code == 2
    assert "'classic' is a protocol and no configuration; name it in evaluate.students" in err


def test_validate_accepts_all_that_comes_with_the_package(capsys) -> None:
    for path in sorted(PRESETS_FOLDER.glob("*.yaml")):
        if path.stem == "recommended":  # its prior is the user's
            assert "generate.model is missing" in called("validate", path.stem, capsys=capsys)[2]
            prior = ["--set", "generate.model=DIR"]
            assert called("validate", path.stem, *prior, capsys=capsys)[:2] == (0, "recommended: no errors\n")
            continue
        assert called("validate", path.stem, capsys=capsys)[:2] == (0, f"{path.stem}: no errors\n")
    code, _, err = called("validate", "demo", "--set", "ipc=0", capsys=capsys)
    assert code == 2
    assert "ipc must be a whole number of at least 1, not 0" in err


def test_what_ls_lists_can_be_copied_and_read(tmp_path: Path, capsys) -> None:
    out = called("ls", capsys=capsys)[1]
    names = [line.split()[0] for line in out.splitlines() if line.startswith("  ")]
    assert {"cifar10_ddoq", "demo", "classic", "gpu8.yaml"} <= set(names)
    for name in ("cifar10_ddoq", "classic", "gpu8.yaml"):
        assert called("cp", name, str(tmp_path / f"{name}.copy"), capsys=capsys)[0] == 0
    assert load_config(tmp_path / "cifar10_ddoq.copy") == load_config("cifar10_ddoq")
    code, _, err = called("cp", "cifar10_ddoq", str(tmp_path / "cifar10_ddoq.copy"), capsys=capsys)
    assert code == 2
    assert "exists already" in err
    assert "did you mean 'cifar10_ddoq'?" in called("cp", "cifar10_ddog", str(tmp_path / "x"), capsys=capsys)[2]
    with pytest.raises(InputError, match=r"no configuration file cifar10_ddog; did you mean 'cifar10_ddoq'\?"):
        load_config("cifar10_ddog")


def test_configurations_are_in_the_package() -> None:
    """An installed wheel has what a checkout has in `configs/`, which is a link to it."""
    assert (ROOT / "configs").resolve() == PRESETS_FOLDER.resolve()
    assert os.readlink(ROOT / "configs") == "dq/config/presets"
    assert RunConfig() != load_config("imagenet1k_ddoq")
