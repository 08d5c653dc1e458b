from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml

from dq.config.overrides import apply_settings
from dq.config.protocols import list_protocols, student_config
from dq.config.reader import dump_config, from_dict, to_dict
from dq.config.schema import ClusterConfig, MethodConfig, RunConfig, load_config
from dq.config.students import EvaluateConfig, StudentConfig
from dq.config.validation import Checked
from dq.core.errors import InputError
from dq.evaluation.trainings import students_of
from dq.run.refinement import labeled

ROOT = Path(__file__).parents[2]


def resolved(config: RunConfig) -> StudentConfig:
    """The first student; what a preset or the number of images decides is not known before."""
    return student_config(
        config.evaluate.students[0], ipc="10", classes=10, image_size=32, where="evaluate.students.0"
    )


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = dataclasses.replace(
        RunConfig(), ipc=(1, 5), methods={"x": MethodConfig(override={"cluster.engine": "clvq"})}, seed=3
    )
    (tmp_path / "c.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "c.yaml") == config


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").glob("*.yaml")) + sorted((ROOT / "dq/config/presets").glob("*.yaml"))
)
def test_shipped_configs_load(path: Path) -> None:
    config = load_config(path)
    assert from_dict(RunConfig, yaml.safe_load(dump_config(config))) == config
    ipcs = [str(i) for i in config.ipc] + ["full"] * ("full" in config.evaluate.baselines)
    students = students_of(config.evaluate, ipcs, 10, config.image_size)
    assert len(students) == len(config.evaluate.students) * len(ipcs)
    own = not config.evaluate.baselines and all(labeled(config, m) for m in config.methods)
    assert config.teachers or own or not any(s.asks_teachers for s in students.values())


@pytest.mark.parametrize("name", list_protocols())
def test_shipped_protocols_hold_for_every_size(name: str) -> None:
    rules = yaml.safe_load((ROOT / f"dq/config/presets/protocols/{name}.yaml").read_text())["rules"]
    named = [rule["when"].get("dataset", []) for rule in rules]
    sets = {None, *(d for n in named for d in (n if isinstance(n, list) else [n]))}
    for dataset in sets:
        for ipc in ("1", "10", "50", "200", "1300", "full"):
            for classes, size in ((10, 32), (100, 32), (200, 64), (10, 224), (1000, 224)):
                spec = {"protocol": name, **({"dataset": dataset} if dataset else {})}
                s = student_config(spec, ipc=ipc, classes=classes, image_size=size)
                assert (s.protocol, from_dict(StudentConfig, to_dict(s))) == (name, s)
                # what the user sets himself wins
                assert student_config(
                    {**spec, "lr": 0.123, "epochs": 7}, ipc=ipc, classes=classes, image_size=size
                ) == (dataclasses.replace(s, lr=0.123, learned_lr=False, epochs=7))


def test_settings_reach_nested_values_and_lists() -> None:
    c = apply_settings(
        RunConfig(),
        [
            "cluster.engine=torch",
            "ipc=[1, 10]",
            "evaluate.students.0.lr=1e-3",
            "methods.ddoq.weights=mass",
            "teachers=[{net: resnet20}, {}]",
            "teachers.1.net=resnet110",
        ],
    )
    assert c.cluster.engine == "torch"
    assert c.ipc == (1, 10)
    assert resolved(c).lr == 1e-3
    assert c.methods["ddoq"].weights == "mass"
    assert [t.net for t in c.teachers] == ["resnet20", "resnet110"]
    assert RunConfig().cluster.engine == "auto"


def test_one_student_and_one_stage_may_stand_alone() -> None:
    c = apply_settings(RunConfig(), ["evaluate.students=convnet3", "refine={stage: fadrm}", "teachers={net: vgg11}"])
    assert c.evaluate.students == ({"net": "convnet3"},)
    assert [stage.stage for stage in c.refine] == ["fadrm"]
    assert [t.net for t in c.teachers] == ["vgg11"]
    one = {"net": "convnet3", "labels": ["hard", "soft"]}
    assert len(apply_settings(RunConfig(), {"evaluate.students": one}).evaluate.students) == 2
    two = apply_settings(RunConfig(), ["evaluate.students=[convnet3, {net: vgg11}]"]).evaluate.students
    assert [s["net"] for s in two] == ["convnet3", "vgg11"]


@pytest.mark.parametrize(
    "settings",
    [
        ["cluster={n_iter: 5}", "cluster.n_iter=6"],
        ["cluster.n_iter=6", "cluster={n_iter: 5}"],
        ["evaluate.students=[{net: vgg11}]", "evaluate.students.0.net=alexnet"],
        ["generate.select_teacher=off", "generate.select_teacher.net=vgg11"],
        ["generate={select_teacher: {net: vgg11}}", "generate.select_teacher={path: a}"],
    ],
)
def test_a_section_and_its_setting_must_agree(settings: list[str]) -> None:
    with pytest.raises(InputError, match=r"is given twice, as .* and by .*; leave one out"):
        apply_settings(RunConfig(), settings)


@pytest.mark.parametrize("order", [1, -1])
def test_a_section_and_another_of_its_settings_are_joined(order: int) -> None:
    settings = ["cluster={n_iter: 5, engine: torch}", "cluster.n_init=3", "cluster.n_iter=5"]
    c = apply_settings(RunConfig(), settings[::order]).cluster
    assert (c.n_iter, c.n_init, c.engine) == (5, 3, "torch")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("cluster.enginee=torch", r"unknown setting 'cluster.enginee'; did you mean 'cluster.engine'\?"),
        ("generate.mode_stop=0.5", "'generate.mode_stop' is now called 'generate.prototype_guidance_stop'"),
        ("prior_report.licence=mit", "'prior_report.licence' is now called 'prior_report.license'"),
        ("cluster.init=race", "cluster.init=race is now called 'pca-multistart'"),
        ("clutser.engine=torch", r"unknown setting 'clutser'; did you mean 'cluster'\?"),
        ("cluster.engine=gpu", "cluster.engine must be one of 'auto'"),
        ("cluster.n_iter=many", "cluster.n_iter must be a whole number of at least 1, not 'many'"),
        ("cluster.n_iter=true", "cluster.n_iter must be a whole number"),
        ("evaluate.students.4.lr=1", "the list has 1 entries"),
        ("seed.x=1", "its parent is the value 0"),
        ("seed", "--set needs key=value"),
        ("seed=[", "value of 'seed' is not readable"),
        ("ipc=ten", "ipc must be a whole number of at least 1, not 'ten'"),
        ("ipc={a: 1}", "ipc must be a list, not {'a': 1}"),
        ("source=here", "source must be a mapping"),
        ("codec.batch_size=0", "codec.batch_size must be a whole number of at least 1, not 0"),
        ("codec.resolution=-8", "codec.resolution must be a whole number of at least 1, not -8"),
        ("cluster.tol=.nan", "cluster.tol must be a finite number of at least 0, not nan"),
        ("cluster.entropy=0", "cluster.entropy must be a number of more than 0, not 0"),
        ("cluster.space=pixels", "cluster.space must be one of 'latents', 'pca', 'whitened', 'features', 'joint'"),
        ("cluster.dims=0", "cluster.dims must be a whole number of at least 1 or 'auto', not 0"),
        ("cluster.feature_weight=-1", "cluster.feature_weight must be a number of at least 0, not -1"),
        ("evaluate.seeds=0", "evaluate.seeds must be a whole number of at least 1, not 0"),
        (
            "generate.guidance_interval=[1]",
            r"generate.guidance_interval must be two rising ratios such as \[0.05, 5\]",
        ),
        ("generate.guidance_interval=[5, 1]", "generate.guidance_interval must be two rising ratios"),
        ("generate.guidance_interval=[-1, 1]", "generate.guidance_interval.0 must be a number of at least 0, not -1"),
        (
            "generate.guidance_interval=[.nan, 1]",
            "generate.guidance_interval.0 must be a number of at least 0, not nan",
        ),
        ("generate.prototype_guidance=1.5", r"generate.prototype_guidance must be a number in \[0, 1\], not 1.5"),
        (
            "generate.prototype_guidance_stop=-0.1",
            r"generate.prototype_guidance_stop must be a number in \[0, 1\], not -0.1",
        ),
        ("generate.noise=ddim", "generate.noise must be one of 'random', 'inversion'"),
        ("generate.rescale=yes", "generate.rescale must be one of 'none', 'norm'"),
        ("generate={noise: inversion, images_per_prototype: 2}", "set images_per_prototype=1"),
        (
            "generate={mode: dit, candidates: 1001}",
            r"generate.candidates must be a whole number in \[1, 1000\], not 1001",
        ),
        ("evaluate.students=[{labels: [hard, fixed], views: null}]", "views of a student must be a mapping .*, not "),
        ("evaluate.students=[{labels: [soft], views: 3}]", "views of a student must be a mapping of settings, not 3"),
        ("evaluate.students=[{labels: [[hard]]}]", "labels lists kinds such as .*, each once, not"),
        ("evaluate.students=[{labels: [hard, 3]}]", "labels lists kinds such as .*, each once, not"),
        ("refine={stage: spectral, sampler_lr: -1}", "refine.0.sampler_lr must be a number of at least 0, not -1"),
        ("refine=[{stage: spectral, sampler_lr: -1}]", "refine.0.sampler_lr must be a number of at least 0, not -1"),
        (
            "refine=[{stage: spectral, sampler_lr: .inf}]",
            "refine.0.sampler_lr must be a finite number of at least 0, not inf",
        ),
        (
            "refine=[{stage: spectral, amplitude: .inf}]",
            "refine.0.amplitude must be a finite number of at least 0, not inf",
        ),
        ("refine=[{stage: spectral, phase: .inf}]", "refine.0.phase must be a finite number of at least 0, not inf"),
        (
            "refine=[{stage: trajectory, first_step: .inf}]",
            "refine.0.first_step must be a finite number of more than 0, not inf",
        ),
        ("train_experts.rho=.inf", "train_experts.rho must be "),
        ("prior.denoiser={intermediate_head: 0.5, num_layers: 1}", "set num_layers to at least 2"),
    ],
)
def test_wrong_settings_name_the_key_and_the_way_out(setting: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        apply_settings(RunConfig(), [setting])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("evaluate.students.0.lr=.inf", "evaluate.students.0.lr must be a finite number of at least 0, not inf"),
        ("evaluate.students.0.temperature=0", "temperature must be a number of more than 0, not 0"),
        ("evaluate.students.0.learning_rate=1", "unknown setting 'evaluate.students.0.learning_rate'; did you mean"),
        (
            "evaluate.students.0.views.mixx=cutmix",
            "evaluate.students.0.views.mixx'; did you mean 'evaluate.students.0.views.mix'",
        ),
        ("evaluate.students.0.views.crop_scale=[0.5]", r"evaluate.students.0.views.crop_scale must be two shares"),
        ("evaluate.students.0.labels=hrad", "evaluate.students.0.labels must be one of 'hard', 'soft', 'fixed'"),
        ("evaluate.students.0.protocol=clasic", "unknown protocol 'clasic'; did you mean 'classic'"),
        ("evaluate.students.0.dataset=mnist", "protocol 'classic' has settings for .*, not for 'mnist'"),
        (
            "evaluate.students.0={dataset: cifar10}",
            "evaluate.students.0.dataset chooses .*students.0.protocol",
        ),
        ("evaluate.students=[{protocol: ddr}]", "ddr is scored by `dq evaluate --protocol ddr --distilled PATH`"),
        ("evaluate.students=[{protocol: [classic]}]", "evaluate.students.0.protocol must be a name, not"),
        ("evaluate.students=[{protocol: classic, dataset: [a]}]", "evaluate.students.0.dataset must be a name, not"),
    ],
)
def test_wrong_settings_of_a_student_name_the_key_too(setting: str, message: str) -> None:
    """They are read once the preset is known, before anything is computed."""
    with pytest.raises(InputError, match=message):
        resolved(apply_settings(RunConfig(), [setting]))


def settings_classes(cls: type) -> set[type]:
    below = cls.__subclasses__()
    return set(below).union(*(settings_classes(sub) for sub in below))


@pytest.mark.parametrize("cls", sorted(settings_classes(Checked), key=lambda c: c.__name__), ids=lambda c: c.__name__)
def test_no_number_is_infinite(cls: type) -> None:
    """Tuples may be: a range of ratios is open at its end."""
    types = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if types[field.name] is float or float in get_args(types[field.name]):
            for value in (float("inf"), float("-inf"), float("nan")):
                with pytest.raises(InputError, match=field.name):
                    cls(**{field.name: value})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ClusterConfig(init="rndom"),
            "init must be one of 'pca-multistart', 'k-means\\+\\+', 'random', not 'rndom'",
        ),
        (lambda: ClusterConfig(on_small="rais"), "on_small must be one of"),
        (lambda: StudentConfig(optimizer="adma"), "optimizer must be one of"),
        (lambda: StudentConfig(batch_size=0), "batch_size must be a whole number of at least 1, not 0"),
    ],
)
def test_values_are_checked_in_python_too(make, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no configuration file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1\nb: 2")
    with pytest.raises(InputError, match=r"bad.yaml is not valid YAML \(line"):
        load_config(tmp_path / "bad.yaml")


@pytest.mark.parametrize(
    "path", sorted([*ROOT.glob("configs/*.yaml"), *ROOT.glob("dq/config/presets/*.yaml")]), ids=lambda p: p.name
)
def test_every_shipped_configuration_loads(path):
    config = load_config(path)
    assert config.source.path or path.name == "recommended.yaml"  # the verb that runs it is told the images
    for method in config.methods:
        apply_settings(config, dict(config.methods[method].override))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"stage": "frepo", "label_margin": math.nan},
            "refine.0.label_margin must be a finite number of at least 0, not nan",
        ),
        ({"stage": "frepo", "online_lr": -1}, "refine.0.online_lr must be a number of at least 0, not -1"),
        ({"stage": "frepo", "nets": ["frepoconv3", "frepoconv4"], "pool_size": 1}, "raise pool_size"),
        ({"stage": "gradient", "net_lr": -1.0}, "refine.0.net_lr must be a number of at least 0, not -1"),
        (
            {"stage": "trajectory", "experts": "x", "threshold": 0},
            "threshold must be a number of more than 0 or 'preset', not 0",
        ),
        (
            {"stage": "trajectory", "experts": "x", "min_accuracy": 5},
            r"min_accuracy must be a number in \[0, 1\] or 'auto', not 5",
        ),
    ],
)
def test_settings_of_refinement_that_no_method_could_use_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        from_dict(RunConfig, {"refine": [settings]})


def test_a_key_twice_in_a_mapping_is_refused(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("base: &b {seed: 1}\nseed: 1\nsource: {path: x, image_size: 8, path: y}\n")
    with pytest.raises(InputError, match=r"key 'source.path' is given twice, again in line 3"):
        load_config(path)
    path.write_text("seed: 1\nmethods:\n  a: &a {weights: sqrt}\n  b: {<<: *a, weights: uniform}\n")
    assert load_config(path).methods["b"].weights == "uniform"  # a merged key may be set again


def test_a_rate_of_ones_own_is_not_replaced_by_a_learned_one():
    def student(**own):
        return student_config({"protocol": "classic", **own}, ipc="1", classes=10, image_size=32)

    assert student().for_step_size(0.2).lr == 0.2
    assert student(lr=0.5).for_step_size(0.2).lr == 0.5
    assert student(lr=0.5, learned_lr=True).for_step_size(0.2).lr == 0.2


def test_a_warm_up_as_long_as_the_training_is_named(caplog):
    students_of(EvaluateConfig(students=({"protocol": "frepo", "epochs": 20},)), ["1"], 10, 32)
    assert "never leaves its warm-up of 500 epochs in 20" in caplog.text
