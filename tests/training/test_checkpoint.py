"""Checkpoints: exact round trips with buffers, whole folders or none, damage named."""

import errno
import json

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from training.checkpoint import (
    checkpoint_hash,
    load_model,
    load_optimizer_tensors,
    model_tensors,
    optimizer_tensors,
    save_model,
)
from training.errors import UserError
from training.parallel import saved


def tiny_moe(seed=0):
    torch.manual_seed(seed)
    config = DeepseekV3Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        q_lora_rank=None,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=4,
        max_position_embeddings=64,
    )
    model = DeepseekV3ForCausalLM(config).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn(buffer.shape))
    return model


def tiny_dense():
    torch.manual_seed(1)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            tie_word_embeddings=True,
        )
    ).eval()


@pytest.fixture
def tokenizer():
    words = {word: index for index, word in enumerate(["<pad>", "<eos>", "one", "two", "<think>"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


@pytest.mark.parametrize("make", [tiny_moe, tiny_dense])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_buffers_and_tokenizer_come_back_exactly(tmp_path, tokenizer, make, dtype):
    model = make()
    for parameter in model.parameters():  # the router bias stays float32, as transformers keeps it
        parameter.data = parameter.data.to(dtype)
    save_model(model, tokenizer, tmp_path / "checkpoint")
    loaded, loaded_tokenizer = load_model(tmp_path / "checkpoint")
    assert type(loaded) is type(model)
    expected, found = model.state_dict(), loaded.state_dict()
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    assert not loaded.training
    ids = torch.tensor([[2, 3, 4, 1]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded_tokenizer.encode("one two") == [2, 3]
    assert (loaded_tokenizer.pad_token_id, loaded_tokenizer.eos_token_id) == (0, 1)


def test_the_router_bias_is_in_the_file(tmp_path):
    model = tiny_moe()
    save_model(model, None, tmp_path / "checkpoint")
    others, _ = load_model(tmp_path / "checkpoint")
    biases = [name for name in model.state_dict() if name.endswith("e_score_correction_bias")]
    assert biases
    for name in biases:
        assert others.state_dict()[name].abs().sum() > 0
        assert torch.equal(others.state_dict()[name], model.state_dict()[name])


def test_transformers_alone_reads_the_folder(tmp_path):
    model = tiny_moe()
    save_model(model, None, tmp_path / "checkpoint")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    assert all(torch.equal(plain.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_equal_models_make_equal_folders(tmp_path, tokenizer):
    save_model(tiny_moe(), tokenizer, tmp_path / "a")
    save_model(tiny_moe(), tokenizer, tmp_path / "b")
    save_model(tiny_moe(seed=2), tokenizer, tmp_path / "c")
    assert checkpoint_hash(tmp_path / "a") == checkpoint_hash(tmp_path / "b")
    assert checkpoint_hash(tmp_path / "a") != checkpoint_hash(tmp_path / "c")


def test_a_save_of_a_loaded_model_is_the_same_folder(tmp_path, tokenizer):
    save_model(tiny_moe(), tokenizer, tmp_path / "a")
    save_model(*load_model(tmp_path / "a"), tmp_path / "b")
    assert checkpoint_hash(tmp_path / "a") == checkpoint_hash(tmp_path / "b")


@pytest.mark.parametrize("victim", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_damage_is_named(tmp_path, tokenizer, victim, damage):
    save_model(tiny_moe(), tokenizer, tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / victim
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[:100])
    else:
        content[-2] ^= 1
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_model(tmp_path / "checkpoint")
    assert victim in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\x00" * 64, b"{}"])
def test_a_broken_foreign_checkpoint_is_one_line(tmp_path, content):
    """A folder without our manifest: safetensors' own checks speak."""
    save_model(tiny_dense(), None, tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "manifest.json").unlink()
    (tmp_path / "checkpoint" / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="cannot be loaded as a checkpoint") as caught:
        load_model(tmp_path / "checkpoint")
    assert "\n" not in str(caught.value)


def test_an_unknown_architecture_is_named(tmp_path):
    save_model(tiny_dense(), None, tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "manifest.json").unlink()
    path = tmp_path / "checkpoint" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": ["NoSuchModel"]}))
    with pytest.raises(UserError, match="NoSuchModel"):
        load_model(tmp_path / "checkpoint")


def test_no_folder_is_one_line(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        load_model(tmp_path / "nowhere")


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, tokenizer, monkeypatch):
    path = tmp_path / "checkpoint"
    save_model(tiny_moe(), tokenizer, path)
    before = checkpoint_hash(path)
    other = tiny_moe(seed=2)

    def refuse(folder, **_):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(other, "save_pretrained", refuse)
    with pytest.raises(UserError, match="checkpoint: no room to write"):
        save_model(other, tokenizer, path)
    assert checkpoint_hash(path) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]


def train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        ids = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(step))
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_training_goes_on_exactly_from_saved_tensors(tmp_path):
    """Six steps in one go, and three, a save, a load into fresh objects and three: the same bits."""

    def fresh(seed):
        model = tiny_moe(seed)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)

    whole, whole_optimizer = fresh(0)
    train(whole, whole_optimizer, 6)
    first, first_optimizer = fresh(0)
    train(first, first_optimizer, 3)
    saved.write(tmp_path, {**model_tensors(first, "policy."), **optimizer_tensors(first_optimizer)})
    second, second_optimizer = fresh(5)
    saved.read_into(tmp_path, model_tensors(second, "policy."))
    load_optimizer_tensors(second_optimizer, saved.read(tmp_path))
    train(second, second_optimizer, 3, first=3)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor), name


def test_a_resume_point_is_several_files_each_of_which_is_small(tmp_path, monkeypatch):
    """A file is put together in memory before it is written: one of all tensors would take their memory twice more."""
    monkeypatch.setattr(saved, "FILE_BYTES", 1000)
    tensors = {
        name: torch.full((size,), float(size))
        for name, size in (("a", 200), ("b", 100), ("c", 400), ("d", 3))
    }
    saved.write(tmp_path, tensors)
    sizes = sorted(
        sum(t.numel() for t in load_file(path).values()) for path in tmp_path.glob("*.safetensors")
    )
    assert sizes == [3, 100, 200, 400]  # numbers: 200 and 100, or 400 and 3, are more than 1,000 bytes
    found = saved.read(tmp_path)
    assert list(found) and all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_an_optimizer_that_keeps_other_things_is_refused():
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    optimizer.state[parameter]["count"] = "three"
    with pytest.raises(TypeError, match="'count' is str, expected a tensor"):
        optimizer_tensors(optimizer)


def test_counters_and_states_within_states_come_back_as_they_were():
    def fresh():
        parameter = torch.nn.Parameter(torch.zeros(2))
        return torch.optim.SGD([parameter], lr=0.1), parameter

    optimizer, parameter = fresh()
    codes = torch.tensor([3, 200], dtype=torch.uint8)
    optimizer.state[parameter] = {"step": 7, "quantized": {"codes": codes, "scale": torch.tensor([0.5])}}
    other, its = fresh()
    load_optimizer_tensors(other, optimizer_tensors(optimizer))
    found = other.state[its]
    assert found["step"] == 7 and type(found["step"]) is int
    assert torch.equal(found["quantized"]["codes"], codes) and found["quantized"]["scale"] == 0.5


def test_a_large_model_is_several_files_which_plain_transformers_loads(tmp_path, monkeypatch):
    monkeypatch.setattr("training.checkpoint.SHARD", "20KB")
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    save_model(model, None, tmp_path / "checkpoint")
    assert len(list((tmp_path / "checkpoint").glob("model-*.safetensors"))) > 1
    for loaded in (
        load_model(tmp_path / "checkpoint")[0],
        AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint"),
    ):
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
