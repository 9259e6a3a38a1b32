"""LoRA through PEFT: adapters begin as nothing, are all that is trained, are read by PEFT, and resume bit for bit."""

import copy
import dataclasses
import json

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from transformers import AutoModelForCausalLM

from tests.support.own_models import write_folder, write_sums
from training import adapters, checkpoint, pipeline, prompts, reward_model
from training.check import check
from training.context import StageContext
from training.engines import weights
from training.errors import UserError
from training.loops import grpo
from training.loops.optim import Optimizer
from training.model import load
from training.parallel import saved
from training.policy import load_policy, save_policy
from training.progress import Progress
from training.recipe import load as load_recipe
from training.recipe import make
from training.rewards import Reward, Scored
from training.run_dir import RunDir, StageDir
from training.sections import Lora, RewardModels, Zero
from training.tasks.problem import Problem

peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")

FAMILIES = {
    "qwen2": Lora(rank=4),
    "gpt2": Lora(rank=4),  # its linear layers are transposed
    "llama": Lora(rank=4, targets=["q_proj", "down_proj"], alpha=2.0),
    "qwen3_moe": Lora(rank=2, experts=True),
    "mixtral": Lora(rank=2),
    "deepseek_v3": Lora(rank=2, experts=True),
}
IDS = torch.tensor([[5, 6, 7, 8, 9, 20, 30, 40]])
PROBLEMS = [Problem(f"p{n}", "test", "reasoning", "en", f"What is {n} plus 1?", str(n + 1)) for n in range(4)]


def disturb(model):
    """Adapters that compute something, as after training."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if adapters.is_adapter(name):
                parameter.normal_(std=0.2)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """The folder of a model, the settings of its adapters, and the model without them."""
    folder = write_folder(tmp_path_factory.mktemp("own") / "own", request.param)
    return folder, FAMILIES[request.param], load(folder)[0]


@pytest.fixture(scope="module")
def adapted(family):
    """The folder of the family, a model with adapters that compute something, its tokenizer, and what it gave as they began."""
    folder, lora, _ = family
    model, tokenizer = load(folder)
    adapters.attach(model, lora, 0)
    begun = logits(model)
    disturb(model)
    return folder, model, tokenizer, begun


def test_adapters_begin_as_nothing_and_are_all_that_is_trained(family, adapted):
    _, lora, plain = family
    _, model, _, begun = adapted
    assert torch.equal(begun, logits(plain))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all(map(adapters.is_adapter, trained))
    scales = {layer.scaling[adapters.NAME] for layer in adapters._layers(model).values()}
    assert scales == {lora.alpha / lora.rank if lora.alpha else 2.0}


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_moe", "mixtral"])
def test_every_linear_layer_of_a_mixture_gets_them_and_its_experts_where_they_are_asked_for(name, tmp_path):
    """PEFT takes such names as gate_proj for those of experts, whatever else has them."""
    for experts in (False, True):
        model, _ = load(write_folder(tmp_path / f"{name}-{experts}", name))
        linear = {
            f"{at}.weight"
            for at, each in model.named_modules()
            if isinstance(each, torch.nn.Linear) and each is not model.lm_head
        }
        stacked = {at for at, each in model.named_parameters() if each.ndim == 3}
        assert linear and stacked
        adapters.attach(model, Lora(rank=2, experts=experts), 0)
        assert adapters._layers(model).keys() == linear | (stacked if experts else set())


def test_a_layer_of_a_mixture_is_named_as_in_any_model(tmp_path):
    folder = write_folder(tmp_path / "own", "deepseek_v3")
    model, _ = load(folder)
    adapters.attach(model, Lora(rank=2, targets=["down_proj"]), 0)
    adapted = adapters._layers(model).keys()
    assert adapted and all(name.endswith(".down_proj.weight") and ".experts." not in name for name in adapted)
    disturb(model)
    adapters.save(model, tmp_path / "adapter", str(folder))
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-5)
    model, _ = load(folder)
    with pytest.raises(UserError, match="model.lora.dropout: expected 0 with adapters of .*down_proj.weight"):
        adapters.attach(model, Lora(rank=2, dropout=0.1), 0)


def test_off_is_the_model_before_and_merged_is_the_model_with_them(family, adapted):
    *_, plain = family
    _, model, *_ = adapted
    before, after = logits(plain), logits(model)
    assert (after - before).abs().max() > 0.05
    with adapters.off(model):
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), after)
    assert all(p.requires_grad == adapters.is_adapter(name) for name, p in model.named_parameters())
    merged = copy.deepcopy(plain)
    merged.load_state_dict(adapters.merged_state(model))
    torch.testing.assert_close(logits(merged), after, rtol=1e-4, atol=1e-5)


def test_peft_reads_them_and_computes_the_same(adapted, tmp_path):
    folder, model, *_ = adapted
    adapters.save(model, tmp_path / "adapter", str(folder))
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-5)


def test_a_checkpoint_and_a_servers_weights_are_merged(adapted, tmp_path):
    _, model, tokenizer, _ = adapted
    checkpoint.save_model(model, tokenizer, tmp_path / "checkpoint")
    weights.write(model, tmp_path / "served", torch.float32)
    for written in ("checkpoint", "served"):
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / written, dtype=torch.float32).eval()
        torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-5)


# --- a stage ---


def context(folder, start, config, lora, **settings):
    """A stage that starts from the folder `start`."""
    recipe = make({"model": {"pretrained": str(start), "lora": dataclasses.asdict(lora)}, **settings})
    stage = StageDir(folder / "zero")
    stage.begin({}, {})
    return StageContext(
        "zero", recipe, dataclasses.replace(config, start=str(start)), stage, {}, Progress(quiet=True)
    )


def config(**changes):
    small = dict(steps=2, prompts=2, group_size=4, minibatches=2, max_new_tokens=8, lr=1e-2, save_every=1)
    return Zero(**{**small, **changes})


def reward(step, samples):
    """More for more even token ids."""
    values = [sum(token % 2 == 0 for token in sample.token_ids) / len(sample.token_ids) for sample in samples]
    return [
        Scored(sample, value, {"even": Reward(value, "")})
        for sample, value in zip(samples, values, strict=True)
    ]


def train(at, reward=reward):
    policy, tokenizer = load_policy(at)
    grpo.train(
        policy, tokenizer, lambda step: PROBLEMS[: at.config.prompts], prompts.chat, reward, at.config, at
    )
    return policy, tokenizer


def without_times(rows):
    return [{k: v for k, v in row.items() if not k.endswith(("_seconds", "_per_second"))} for row in rows]


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("own") / "own", "qwen2")


def test_the_reference_is_the_model_without_adapters(tmp_path, own):
    """The KL term is the one to a copy of the start."""
    at = context(tmp_path / "a", own, config(kl_coef=0.1), Lora(rank=4))
    train(at)
    rows = at.stage.metrics()
    assert rows[-1]["kl"] > 1e-5
    copy_at = context(tmp_path / "b", own, config(kl_coef=0.1), Lora(rank=4))
    policy, tokenizer = load_policy(copy_at)
    plain, _ = load(own)
    grpo.train(
        policy,
        tokenizer,
        lambda step: PROBLEMS[:2],
        prompts.chat,
        reward,
        copy_at.config,
        copy_at,
        reference=plain,
    )
    assert copy_at.stage.metrics()[-1]["kl"] == pytest.approx(rows[-1]["kl"], rel=1e-4)


def test_a_killed_stage_ends_as_if_it_had_not_been(tmp_path, own):
    """The resume point holds adapters and their moments alone."""
    lora = Lora(rank=4)
    whole = context(tmp_path / "whole", own, config(steps=3), lora)
    expected, _ = train(whole)

    class Stop(Exception):
        pass

    def stops(step, samples):
        if step == 2:
            raise Stop
        return reward(step, samples)

    killed = context(tmp_path / "killed", own, config(steps=3), lora)
    with pytest.raises(Stop):
        train(killed, stops)
    state = killed.stage.load_state()
    assert state.step == 2
    assert all(adapters.is_adapter(name) for name in state.tensors if name.startswith("model."))
    again = context(tmp_path / "killed", own, config(steps=3), lora)
    found, _ = train(again)
    assert without_times(again.stage.metrics()) == without_times(whole.stage.metrics())
    for (name, one), (other_name, other) in zip(
        expected.state_dict().items(), found.state_dict().items(), strict=True
    ):
        assert name == other_name and torch.equal(one, other)


def test_a_resume_point_without_an_adapter_is_refused(own, tmp_path):
    model, _ = load(own)
    adapters.attach(model, Lora(rank=2), 0)
    tensors = Optimizer(model, weight_decay=0.0, grad_clip=1.0).tensors()
    tensors.pop(next(iter(tensors)))
    saved.write(tmp_path, tensors)
    with pytest.raises(CheckpointException, match="lora_A"):
        saved.read_into(tmp_path, checkpoint.model_tensors(model))


@pytest.mark.parametrize("change", [{"fused_loss": True}, {"micro_batch_tokens": 40}])
def test_shared_prefixes_and_the_fused_loss_take_the_same_step(tmp_path, own, change):
    """Against a prompt that each response repeats, and log-probs before the loss."""
    plain = context(tmp_path / "plain", own, config(steps=1), Lora(rank=4), shared_prefix=False)
    changed = context(tmp_path / "changed", own, config(steps=1, **change), Lora(rank=4))
    (one, _), (other, _) = train(plain), train(changed)
    for name, tensor in one.state_dict().items():
        if adapters.is_adapter(name):
            torch.testing.assert_close(other.state_dict()[name], tensor, rtol=1e-3, atol=1e-5)


def test_experts_of_a_mixture_learn_with_replayed_routing(tmp_path):
    folder = write_folder(tmp_path / "own", "qwen3_moe")
    at = context(tmp_path, folder, config(), Lora(rank=2, experts=True))
    policy, _ = train(at)
    moved = [
        name for name, p in policy.named_parameters() if "experts" in name and "lora_B" in name and p.any()
    ]
    assert len(moved) == 2 * policy.config.num_hidden_layers
    assert at.stage.metrics()[-1]["replay_agreement_old"] == 1.0


def test_the_selection_bias_of_routers_stands_still_beside_adapters(tmp_path):
    folder = write_folder(tmp_path / "own", "deepseek_v3")
    at = context(tmp_path, folder, config(bias_rate=0.5), Lora(rank=2))
    policy, tokenizer = train(at)
    save_policy(policy, tokenizer, at)
    before, after = (
        checkpoint.load_model(path)[0].state_dict() for path in (folder, at.stage.path / "checkpoint")
    )
    biases = [name for name in before if name.endswith("e_score_correction_bias")]
    assert biases and all(torch.equal(before[name], after[name]) for name in biases)


def test_a_recipe_goes_from_stage_to_stage(tmp_path):
    """base, sft and zero: each adapter belongs to the weights that its stage began with."""
    folder = write_folder(tmp_path / "own", "qwen2")
    write_sums(tmp_path)
    recipe = make(
        {
            "model": {"pretrained": str(folder), "lora": {"rank": 4}},
            "task": [f"jsonl:{tmp_path / 'data.jsonl'}"],
            "stages": ["base", "sft1", "rl_reasoning"],
            "sft1": {"steps": 2, "data": str(tmp_path / "traces.jsonl"), "lr": 1e-2},
            "rl_reasoning": {"steps": 1, "prompts": 2, "group_size": 2, "max_new_tokens": 8, "lr": 1e-2},
        }
    )
    run = RunDir(tmp_path / "run")
    pipeline.run(recipe, run, progress=Progress(quiet=True))
    assert not (run.path / "base" / adapters.FOLDER).exists()
    for stage, base in (("sft1", folder), ("rl_reasoning", run.path / "sft1" / "checkpoint")):
        adapter = run.path / stage / adapters.FOLDER
        assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
            base
        )
        theirs = peft.AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32)
        merged, _ = load(run.path / stage / "checkpoint")
        torch.testing.assert_close(logits(merged), logits(theirs.merge_and_unload()), rtol=1e-4, atol=1e-5)
        assert any(name.startswith(adapters.FOLDER) for name in run.stage(stage).record()["outputs"])


# --- reward models and students ---


@pytest.mark.parametrize("name", ["qwen2", "qwen3_moe"])
def test_a_reward_model_learns_adapters_and_its_head_and_peft_reads_it(tmp_path, name):
    folder = write_folder(tmp_path / "own", name)
    language_model, tokenizer = load(folder)
    model = reward_model.from_language_model(language_model)
    adapters.attach(model, dataclasses.replace(FAMILIES[name], targets=[]), 0)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert "score.weight" in trained and all(map(adapters.is_trained, trained))
    assert set(checkpoint.model_tensors(model)) == {f"model.{each}" for each in trained}
    disturb(model)
    torch.nn.init.normal_(model.score.weight)
    checkpoint.save_model(model, tokenizer, tmp_path / "checkpoint-helpful")
    adapters.save(model, tmp_path / "adapter-helpful", str(folder))
    merged, _ = checkpoint.load_model(tmp_path / "checkpoint-helpful")
    theirs = peft.AutoPeftModelForSequenceClassification.from_pretrained(
        tmp_path / "adapter-helpful", num_labels=1, dtype=torch.float32
    ).eval()
    for other in (merged, theirs):
        torch.testing.assert_close(logits(other), logits(model), rtol=1e-4, atol=1e-5)


def test_a_killed_reward_model_ends_as_if_it_had_not_been(tmp_path, own):
    pairs = [
        reward_model.Pair(problem, f"it is {problem.reference}", "it is not known") for problem in PROBLEMS
    ]
    settings = RewardModels(steps=3, batch_size=2, save_every=1, lr=1e-2, lr_end=1e-2)

    def trained(at, stop=None):
        language_model, tokenizer = load(own)
        model = reward_model.from_language_model(language_model)
        adapters.attach(model, Lora(rank=2), 0)
        if stop is not None:
            log = at.stage.log
            at.stage.log = lambda **row: log(**row) if row["step"] < stop else 1 / 0
        reward_model.train(model, tokenizer, pairs, settings, at)
        return at.stage.metrics(), model.state_dict()

    rows, expected = trained(context(tmp_path / "whole", own, config(), Lora(rank=2)))
    with pytest.raises(ZeroDivisionError):
        trained(context(tmp_path / "killed", own, config(), Lora(rank=2)), stop=2)
    again, found = trained(context(tmp_path / "killed", own, config(), Lora(rank=2)))
    assert again == rows and rows[-1]["loss"] < rows[0]["loss"]
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("method", ["sft", "on_policy"])
def test_a_pretrained_student_learns_adapters(tmp_path, method):
    """Its checkpoint is merged, and PEFT reads the adapters beside it."""
    folder = write_folder(tmp_path / "own", "qwen2")
    taught, tokenizer = checkpoint.load_model(folder)
    with torch.no_grad():
        taught.lm_head.weight.mul_(3.0)
    checkpoint.save_model(taught, tokenizer, tmp_path / "teacher")
    (tmp_path / "data.jsonl").write_text(
        "".join(json.dumps({"question": f"What is {n} plus 1?", "answer": n + 1}) + "\n" for n in range(40))
    )
    recipe = make(
        {
            "model": {"pretrained": str(folder)},
            "task": [f"jsonl:{tmp_path / 'data.jsonl'}"],
            "stages": ["distill"],
            "distill": {
                **{
                    "teacher": str(tmp_path / "teacher"),
                    "method": method,
                    "samples": 1,
                    "filters": [],
                    "max_new_tokens": 4,
                },
                "students": {
                    "own": {
                        **{"pretrained": str(folder), "steps": 1, "batch_size": 4, "lr": 1e-2},
                        "lora": {"rank": 2},
                    }
                },
            },
        }
    )
    run = RunDir(tmp_path / "run")
    pipeline.run(recipe, run, progress=Progress(quiet=True))
    adapter = run.path / "distill" / "adapter-own"
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(folder)
    merged, _ = load(run.path / "distill" / "checkpoint-own")
    start, _ = load(folder)
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32)
    torch.testing.assert_close(logits(merged), logits(theirs.merge_and_unload()), rtol=1e-4, atol=1e-5)
    assert (logits(merged) - logits(start)).abs().max() > 1e-4
    assert any(name.startswith("adapter-own") for name in run.stage("distill").record()["outputs"])


# --- what cannot be ---


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["model.lora.alpha=3"], "model.lora.rank: expected at least 1 where other settings"),
        (
            ["model.lora.rank=2", "model.lora.experts=true", "model.lora.dropout=0.1"],
            "model.lora.dropout: expected 0",
        ),
        (
            ["distill.students.llama.lora.rank=2"],
            "distill.students.llama.lora.rank: expected 0 for a student from random weights",
        ),
        (["distill.students.qwen2.lora.alpha=2"], "distill.students.qwen2.lora.rank: expected at least 1"),
        (["model.lora.rank=2", "zero.reference_every=5"], "zero.reference_every: expected 0 with model.lora"),
    ],
)
def test_settings_that_do_not_go_together_are_one_line(words, text):
    with pytest.raises(UserError, match=f"^{text}"):
        check(load_recipe("smoke", words), data=False)


@pytest.mark.parametrize(
    ("lora", "text"),
    [
        (Lora(rank=2, targets=["w_proj"]), "model.lora: .*w_proj.*it has .*q_proj"),
        (Lora(rank=2, targets=["q_proj", "lm_head"]), "lm_head|adapter"),
        (Lora(rank=2, experts=True), "model.lora.experts: expected a mixture"),
    ],
)
def test_what_a_model_does_not_have_is_one_line(tmp_path, own, lora, text):
    with pytest.raises(UserError, match=text):
        load_policy(context(tmp_path, own, config(), lora))


def test_a_missing_peft_is_one_line_before_the_first_stage(monkeypatch):
    monkeypatch.setattr("training.optional.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="^model.lora needs the package peft: pip install peft$"):
        check(load_recipe("smoke", ["model.lora.rank=2"]), data=False)
