"""A model that a person brings: what is served and how, what is refused in one line, and what is written back."""

import copy
import json
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.studies import mixtures
from r1kernels.integrations import transformers as integration
from tests.support.own_models import FAMILIES, edit_json, write_folder
from training import notices, prompts, responses, reward_model
from training.checkpoint import load_model, save_model
from training.cli import main
from training.context import StageContext
from training.document import Document
from training.encoder import Encoder
from training.engines.transformers import TransformersEngine
from training.errors import UserError
from training.estimate import count
from training.judge import judge
from training.loops import grpo, next_token
from training.loops.batch import collate, logprobs
from training.loops.sample import Prompt, sample
from training.model import StepLoad, is_patched, load, prepare
from training.placement import placed
from training.pretrained import load_pretrained, pretrained_config
from training.progress import Progress
from training.recipe import load as load_recipe
from training.response import parse
from training.rewards import Reward, Sample, Scored
from training.run_dir import StageDir
from training.sections import Grpo, NextToken
from training.tasks.problem import Problem

UNSERVED = ("mamba", "qwen3_next")
SERVED = [family for family in FAMILIES if family not in UNSERVED]
MIXTURES = ["qwen3_moe", "olmoe", "mixtral", "gpt_oss", "deepseek_v3"]
PROBLEMS = [
    Problem(f"p{n}", "test", "reasoning", "en", f"What is {n} plus 34?", str(n + 34)) for n in (1, 12, 7)
]
ASKED = [Prompt(problem, prompts.chat(problem)) for problem in PROBLEMS]
GRPO = Grpo(steps=1, prompts=3, group_size=4, minibatches=1, max_new_tokens=6, lr=1e-3, save_every=0)


def context(folder, config, recipe=None):
    stage = StageDir(folder)
    stage.begin({}, {})
    return StageContext("zero", recipe or load_recipe("smoke"), config, stage, {}, Progress(quiet=True))


def parity(step, samples):
    """The share of odd token ids: a reward with some spread for a model that knows nothing."""
    values = [sum(token % 2 for token in one.token_ids) / len(one.token_ids) for one in samples]
    return [
        Scored(one, value, {"parity": Reward(value, "")}) for one, value in zip(samples, values, strict=True)
    ]


def one_step(model, tokenizer, folder, config=GRPO):
    at = context(folder, config)
    grpo.train(model, tokenizer, lambda step: PROBLEMS, prompts.chat, parity, config, at)
    return at.stage.metrics()[0]


def heard(work):
    found = []
    with notices.listening(lambda kind, text: found.append(text)):
        work()
    return found


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """family -> its folder as `write_folder` makes it, written once; not to be changed."""
    return cache(lambda family: write_folder(tmp_path_factory.mktemp(family), family))


# --- families ---


@pytest.mark.parametrize("family", SERVED)
def test_greedy_sampling_is_what_transformers_generates(own, family):
    model, tokenizer = load(own(family))
    plain = AutoModelForCausalLM.from_pretrained(own(family))
    for completion in sample(
        TransformersEngine(model, tokenizer), ASKED, temperature=0.0, max_new_tokens=8, seed_parts=(0,)
    ):
        ids = torch.tensor([completion.prompt_ids])
        expected = plain.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=0,
        )
        assert tuple(expected[0, ids.shape[1] :].tolist()) == completion.token_ids


@pytest.mark.parametrize("family", SERVED)
def test_a_step_of_grpo_and_one_of_sft(own, tmp_path, family):
    model, tokenizer = load(own(family))
    metrics = one_step(model, tokenizer, tmp_path / "zero")
    assert metrics["skipped"] == 0 and metrics["grad_norm"] > 0 and metrics["entropy"] > 0
    documents = [Document("<think> 1 </think> <answer> 46 </answer>", prompts.ask("What is 12 plus 34?"))] * 2
    config = NextToken(steps=8, batch_size=2, lr=1e-2, max_length=0)
    at = context(tmp_path / "sft", config)
    next_token.train(model, tokenizer, documents, config, at)
    rows = at.stage.metrics()
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]


@pytest.mark.parametrize("family", SERVED)
def test_a_dry_run_counts_every_parameter(own, family):
    folder = own(family)
    model = AutoModelForCausalLM.from_pretrained(folder)
    counted = count(pretrained_config(str(folder)))
    assert counted.total == sum(parameter.numel() for parameter in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert counted.active == counted.total - experts // 2  # two of four experts
    assert (counted.active < counted.total) == (family in (*MIXTURES, "phimoe"))


@pytest.mark.parametrize("spec", ["nowhere", "./nowhere"])
def test_a_dry_run_of_a_missing_folder_is_an_error(tmp_path, capsys, spec):
    assert main(["run", "tiny", f"model.pretrained={spec}", "--dry-run"]) == 2
    assert "there is no folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("family", "named"),
    [("mamba", "mamba is a state-space"), ("qwen3_next", "qwen3_next .*linear_attention")],
)
def test_models_without_a_cache_of_keys_and_values_are_refused_by_name(own, family, named):
    for asked in (load_pretrained, pretrained_config):
        with pytest.raises(UserError, match=named) as caught:
            asked(str(own(family)))
        assert "\n" not in str(caught.value)


# --- mixtures ---


@pytest.mark.parametrize("family", ["afmoe", "lfm2_moe"])
def test_a_selection_bias_of_any_name_evens_the_load(family):
    model = prepare(mixtures.build(family))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    load = StepLoad(model)
    with load.counting(None), torch.no_grad():
        model(input_ids=torch.arange(8).unsqueeze(0))
    load.update_bias(0.5)
    moved = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert moved and all(name.endswith("expert_bias") for name in moved)


@pytest.mark.parametrize("family", MIXTURES)
def test_the_routing_of_a_rollout_is_replayed_in_every_mixture(own, family):
    model, tokenizer = load(own(family))
    assert is_patched(model) and integration.has_selection_bias(model) == (family == "deepseek_v3")
    drawn = sample(
        TransformersEngine(model, tokenizer),
        ASKED,
        samples=2,
        max_new_tokens=6,
        seed_parts=(0,),
        record_routing=True,
    )
    live = logprobs(model, collate(drawn, 0, torch.device("cpu"), replay=False), 1.0)
    replayed = logprobs(model, collate(drawn, 0, torch.device("cpu"), replay=True), 1.0)
    assert replayed.agreement == 1.0
    torch.testing.assert_close(replayed.logp, live.logp, rtol=1e-5, atol=1e-5)


def test_a_qwen3_moe_goes_through_the_zero_stage_with_replay(tmp_path):
    folder = write_folder(tmp_path / "own", "qwen3_moe", dtype="bfloat16", pad=None, bos=None)
    data = tmp_path / "data.jsonl"
    rows = [{"question": f"What is {n} plus 1?", "answer": n + 1} for n in range(24)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tmp_path / "own.yaml"
    recipe.write_text(
        f"stages: [base, zero]\nmodel: {{pretrained: '{folder}'}}\ntask: ['jsonl:{data}']\n"
        "zero: {steps: 2, prompts: 3, group_size: 4, max_new_tokens: 8}\n"
    )
    assert main(["run", str(recipe), "--run", str(tmp_path / "run")]) == 0
    for row in StageDir(tmp_path / "run" / "zero").metrics():
        assert row["replay_agreement_old"] == row["replay_agreement_reference"] == 1.0
        assert row["replay_agreement"] == 1.0 and row["expert_load"] >= 1
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "zero" / "checkpoint")
    assert saved.dtype == torch.bfloat16 and type(saved).__name__ == "Qwen3MoeForCausalLM"


def test_a_mixture_that_cannot_be_patched_still_trains_and_says_so(own, tmp_path):
    loaded = []
    (said,) = heard(lambda: loaded.append(load(own("phimoe"))))
    assert "PhimoeForCausalLM" in said and "without routing replay" in said and "\n" not in said
    metrics = one_step(*loaded[0], tmp_path / "zero")
    assert metrics["skipped"] == 0 and "replay_agreement" not in metrics


# --- dtypes ---


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_narrow_folder_is_trained_in_float32_and_written_back_as_it_was(tmp_path, dtype):
    folder = write_folder(tmp_path / "own", dtype=dtype)
    model, tokenizer = load(folder)
    before = copy.deepcopy(model.state_dict())
    config = replace(GRPO, steps=3, lr=3e-6)
    at = context(tmp_path / "zero", config)
    grpo.train(model, tokenizer, lambda step: PROBLEMS, prompts.chat, parity, config, at)
    changed = [
        (tensor != before[name]).float().mean()
        for name, tensor in model.state_dict().items()
        if tensor.ndim > 1
    ]
    assert min(changed[1:]) > 0.5  # all but the embedding, most of whose words are never seen
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    save_model(model, tokenizer, tmp_path / "saved")
    kind = getattr(torch, dtype)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert saved.dtype == kind and {p.dtype for p in saved.parameters()} == {kind}
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == dtype
    ids = torch.arange(3, 23).view(2, 10)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    again, _ = load(tmp_path / "saved")
    assert torch.equal(again(input_ids=ids).logits, plain(input_ids=ids).logits)
    for name, tensor in saved.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].to(kind)), name


def test_a_folder_that_is_taken_as_it_is_keeps_every_bit(tmp_path):
    folder = write_folder(tmp_path / "own", "deepseek_v3", dtype="bfloat16")
    model, tokenizer = load(folder)
    save_model(model, tokenizer, tmp_path / "saved")
    first, _ = load_model(folder)
    second, _ = load_model(tmp_path / "saved")
    for name, tensor in first.state_dict().items():
        assert second.state_dict()[name].dtype == tensor.dtype, name
        assert torch.equal(second.state_dict()[name], tensor), name


def test_tied_and_sharded_weights_survive(tmp_path):
    folder = write_folder(tmp_path / "own", dtype="bfloat16", shard_size="20KB", tie_word_embeddings=True)
    assert len(list(folder.glob("*.safetensors"))) > 1
    model, tokenizer = load(folder)
    save_model(model, tokenizer, tmp_path / "saved")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert plain.lm_head.weight.data_ptr() == plain.model.embed_tokens.weight.data_ptr()
    assert all(torch.equal(plain.state_dict()[name], t.bfloat16()) for name, t in model.state_dict().items())


# --- folders that are not as they should be ---


def test_code_of_a_folder_is_never_run_nor_asked_about(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "own")
    (folder / "modeling_own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    code = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    edit_json(folder / "config.json", auto_map=code, model_type="own")
    edit_json(
        folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling_own.OwnTokenizer", None]}
    )
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    with pytest.raises(UserError, match="needs code that lies in the folder, which is never run") as caught:
        load_pretrained(str(folder))
    assert "\n" not in str(caught.value) and not (tmp_path / "ran").exists()
    edit_json(folder / "config.json", auto_map=code, model_type="qwen2")  # one that transformers knows itself
    edit_json(folder / "tokenizer_config.json", auto_map=None)
    assert type(load_pretrained(str(folder))[0]).__name__ == "Qwen2ForCausalLM"
    assert not (tmp_path / "ran").exists()


def test_a_config_without_architectures_is_a_causal_model_of_its_type(tmp_path):
    folder = write_folder(tmp_path / "own", "qwen3")
    edit_json(folder / "config.json", architectures=None)
    assert type(load_pretrained(str(folder))[0]).__name__ == "Qwen3ForCausalLM"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen99"}, "knows no model_type 'qwen99'"),
        ({"model_type": None}, "knows no model_type None"),
        ({"architectures": ["LlamaModel"]}, "is a LlamaModel, expected a causal language model"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "the weights are quantized"),
        ({"num_hidden_layers": 3}, "it lacks model.layers.2."),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(tmp_path, changes, message):
    folder = write_folder(tmp_path / "own", "llama")
    edit_json(folder / "config.json", **changes)
    with pytest.raises(UserError, match=message) as caught:
        load_pretrained(str(folder))
    assert "\n" not in str(caught.value)


# --- lengths ---


def test_a_prompt_that_is_too_long_is_named_and_a_response_ends_with_the_positions(tmp_path):
    model, tokenizer = load(write_folder(tmp_path / "own", "gpt2", positions=40))
    with pytest.raises(
        UserError, match=r"problem long of test: its prompt has \d+ tokens, .* no more than 40"
    ):
        long = Problem("long", "test", "reasoning", "en", "What is 1 plus 1? " * 9, "2")
        sample(
            TransformersEngine(model, tokenizer),
            [Prompt(long, prompts.chat(long))],
            max_new_tokens=4,
            seed_parts=(0,),
        )
    drawn = sample(TransformersEngine(model, tokenizer), ASKED, max_new_tokens=64, seed_parts=(0,))
    assert all(len(c.prompt_ids) + len(c.token_ids) <= 41 for c in drawn)
    assert any(not c.finished for c in drawn)
    logprobs(model, collate(drawn, 0, torch.device("cpu"), replay=False), 1.0)  # fits, too


def test_problems_that_are_too_long_are_left_out_and_counted(tmp_path):
    model, tokenizer = load(write_folder(tmp_path / "own", positions=64))
    long = [Problem(f"l{n}", "test", "reasoning", "en", "What is 1 plus 1? " * n, "2") for n in (9, 20)]
    kept = []
    (said,) = heard(
        lambda: kept.extend(responses.fitting(model, tokenizer, [*PROBLEMS, *long], prompts.chat))
    )
    assert kept == PROBLEMS
    assert said.startswith("2 of 5 problems are left out") and said.endswith("the model reads 64")
    with pytest.raises(UserError, match="2 of 2 problems are left out"):
        responses.fitting(model, tokenizer, long, prompts.chat)


def test_a_response_that_is_too_long_for_the_judge_is_wrong_and_one_for_a_reward_model_is_cut(tmp_path):
    model, tokenizer = load(write_folder(tmp_path / "own", positions=128))
    texts = ("<answer> 3 </answer>", "the answer is right " * 60)
    candidates = [Sample(PROBLEMS[0], text, parse(text), ()) for text in texts]
    verdicts = []
    (said, *_) = heard(lambda: verdicts.extend(judge(model, tokenizer, candidates)))
    assert said.startswith("1 of 2 responses are too long for the judge")
    assert len(verdicts) == 2 and not verdicts[1].parsed and not verdicts[1].correct
    scorer = reward_model.from_language_model(model)
    (said,) = heard(lambda: reward_model.rewards(scorer, tokenizer, [(PROBLEMS[0], text) for text in texts]))
    assert said.startswith("a response is scored by its last 128 of ")


def test_documents_and_responses_that_are_cut_are_warned_of(tmp_path):
    model, tokenizer = load(write_folder(tmp_path / "own"))
    documents = [Document("the answer is right " * n, prompts.ask("why?")) for n in (1, 30)]
    config = NextToken(steps=1, batch_size=2, max_length=40)

    def train():
        assert (
            next_token.train(model, tokenizer, documents, config, context(tmp_path / "a", config))[
                "truncated"
            ]
            == 1
        )

    (said,) = heard(train)
    assert said.startswith("1 of 2 documents were cut at 40 tokens") and "zero.max_length" in said
    (said,) = heard(
        lambda: sample(TransformersEngine(model, tokenizer), ASKED, max_new_tokens=2, seed_parts=(0,))
    )
    assert said.startswith("3 of 3 responses did not end within 2 tokens") and "'<|im_end|>' ends one" in said


def test_where_the_model_reads_no_more_the_warning_names_that_limit(tmp_path):
    model, tokenizer = load(write_folder(tmp_path / "own", positions=64))
    longest = 64 - min(len(Encoder(model, tokenizer).prompt(each.turns)[0]) for each in ASKED) + 1
    (said,) = heard(
        lambda: sample(TransformersEngine(model, tokenizer), ASKED, max_new_tokens=500, seed_parts=(0,))
    )
    assert f"within {longest} tokens, all that its 64 positions leave" in said
    assert "500" not in said and "max_new_tokens" not in said


def test_nothing_is_cut_where_no_length_is_set(tmp_path):
    model, tokenizer = load(write_folder(tmp_path / "own"))
    documents = [Document("the answer is right " * 30, prompts.ask("why?"))]
    config = NextToken(steps=1, batch_size=1, max_length=0)
    assert not heard(
        lambda: next_token.train(model, tokenizer, documents, config, context(tmp_path / "a", config))
    )


def test_defaults_are_those_of_a_pretrained_model(tmp_path):
    toy, own = load_recipe("smoke"), tmp_path / "own.yaml"
    own.write_text("model: {pretrained: models/own}\nsft2: {lr: 3e-5}\n")
    real = load_recipe(own, ["zero.steps=3"])
    assert real.zero.lr == 1e-6 and real.sft1.lr == 1e-5 and real.sft2.lr == 3e-5 and real.zero.steps == 3
    assert real.sft1.max_length == 0 and real.evaluate.max_new_tokens == real.zero.max_new_tokens == 1024
    assert toy.zero.lr == 5e-4 and toy.sft1.max_length == 192


def test_rates_of_the_small_models_are_warned_of_for_a_pretrained_one(tmp_path, capsys):
    folder = write_folder(tmp_path / "own")
    words = [f"model.pretrained={folder}", "stages=[base,zero]"]
    assert main(["run", "tiny", *words, "zero.lr=5e-4", "--dry-run"]) == 0
    assert "warning: zero.lr = 0.0005 is a rate for models of a million" in capsys.readouterr().out
    assert main(["run", "tiny", *words, "--dry-run"]) == 0
    assert "warning" not in capsys.readouterr().out


# --- memory ---


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "qwen3_moe"])
def test_recomputed_activations_and_small_micro_batches_take_the_same_step(own, tmp_path, family):
    in_backward = []

    def count_recomputed(module, inputs):
        if torch._C._current_graph_task_id() != -1:  # this forward runs within a backward pass
            in_backward.append(type(module).__name__)

    def weights(name, config, **settings):
        in_backward.clear()
        with placed(replace(load_recipe("smoke"), **settings)):
            model, tokenizer = load(own(family))
            one_step(model, tokenizer, tmp_path / name, config)
        return model.state_dict(), len(in_backward)

    with register_module_forward_pre_hook(count_recomputed):
        whole, calls = weights("whole", GRPO)
        again, recomputed = weights("again", GRPO, gradient_checkpointing=True)
        pieces, _ = weights("pieces", replace(GRPO, micro_batch_tokens=30))
    assert calls == 0 < recomputed
    for name in whole:
        torch.testing.assert_close(again[name], whole[name], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(pieces[name], whole[name], rtol=1e-3, atol=2e-4)


def test_without_a_kl_term_no_reference_is_held(tmp_path, monkeypatch):
    model, tokenizer = load(write_folder(tmp_path / "own"))
    monkeypatch.setattr(grpo, "frozen_copy", lambda model: pytest.fail("a copy of the policy"))
    metrics = one_step(model, tokenizer, tmp_path / "zero", replace(GRPO, kl_coef=0.0, reference_every=1))
    assert metrics["skipped"] == 0 and "reference_logprob_seconds" not in metrics


def test_dropout_of_a_killed_sft_is_that_of_a_whole_one(tmp_path):
    folder = write_folder(tmp_path / "own", "gpt2", resid_pdrop=0.3)
    documents = [Document(f"{n} plus {n}", prompts.ask("say it")) for n in range(6)]
    config = NextToken(steps=4, batch_size=3, lr=1e-2, save_every=2)

    def train(at, stop=None):
        model, tokenizer = load(folder)
        log = at.stage.log

        def log_until(**row):
            log(**row)
            if row["step"] == stop:
                raise KeyboardInterrupt

        at.stage.log = log_until
        next_token.train(model, tokenizer, documents, config, at)
        return model.state_dict()

    whole = train(context(tmp_path / "whole", config))
    torch.manual_seed(5)
    with pytest.raises(KeyboardInterrupt):
        train(context(tmp_path / "killed", config), stop=2)
    at = context(tmp_path / "killed", config)
    ended = train(at)
    assert all(torch.equal(ended[name], whole[name]) for name in whole)
    assert AutoTokenizer.from_pretrained(folder).chat_template
