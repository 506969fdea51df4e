"""Models as training uses them, on tiny random Llama and Qwen2 models made here."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Gemma2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from cai_ray.config.training import LoraConfig, TrainConfig
from cai_ray.errors import InputError
from cai_ray.train.advantages import before_tokens
from cai_ray.train.batches import Example, micro_batches, pad
from cai_ray.train.losses import policy_loss, sft_loss, value_loss
from cai_ray.train.models import (
    RewardScale,
    load_policy,
    load_reference,
    load_reward_model,
    load_value_model,
    reward_scale,
)
from cai_ray.train.sequences import score_last, sequence_logprobs, sequence_values
from cai_ray.train.weights.state import save_folder, state_items

PAD, EOS, WORDS = 0, 1, 64
CFG = TrainConfig()
LORA = TrainConfig(lora=LoraConfig(rank=4, alpha=8))


def make_model(folder, family="llama", tied=False, **settings):
    """A random causal LM of two layers, its weights large enough to tell tokens apart, with a tokenizer."""
    kind = {"llama": LlamaConfig, "qwen2": Qwen2Config}[family]
    config = kind(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
        **settings,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words = {"<pad>": PAD, "<eos>": EOS} | {f"w{i}": i for i in range(2, WORDS)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<pad>")), eos_token="<eos>", pad_token="<pad>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def causal(request, tmp_path_factory):
    """Its configuration asks for dropout, as some do: training must not follow."""
    folder = tmp_path_factory.mktemp("causal")
    return make_model(folder, request.param, tied=request.param == "qwen2", attention_dropout=0.1)


@pytest.fixture(scope="module")
def rows():
    g = torch.Generator().manual_seed(1)
    lengths = [5, 12, 7, 9, 3, 12]
    out = []
    for n in lengths:
        ids = [*torch.randint(2, WORDS, (n - 1,), generator=g).tolist(), EOS]
        out.append(Example(ids, [0] * (n // 2) + [1] * (n - n // 2)))
    return out


def logprobs(model, batch):
    return sequence_logprobs(model, batch)


def naive_logprobs(model, batch):
    """From whole logits, for every token."""
    logits = (
        model(**{k: batch[k] for k in ("input_ids", "attention_mask", "position_ids") if k in batch})
        .logits[:, :-1]
        .double()
        .log_softmax(-1)
    )
    return F.pad(logits.gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1), (1, 0))


def real(values, batch):
    """The rows' values at their real tokens, padding left out."""
    return [v[m.bool()] for v, m in zip(values, batch["attention_mask"], strict=True)]


def test_item_13_score_at_the_last_real_token(causal, rows, tmp_path):
    model = load_reward_model(causal, CFG)
    alone = []
    for row in rows:
        batch = pad([row], PAD)
        hidden = model.model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
        naive = (hidden[0, -1] @ model.score.weight[0]).item()
        got = score_last(sequence_values(model, batch), batch["attention_mask"]).item()
        assert got == pytest.approx(naive, abs=1e-5)
        alone.append(got)
    assert max(alone) - min(alone) > 0.1
    for side in ("left", "right"):
        batch = pad(rows, PAD, side)
        scores = score_last(sequence_values(model, batch), batch["attention_mask"])
        torch.testing.assert_close(scores, torch.tensor(alone), atol=1e-5, rtol=0)
    # Also where the pad token ends the text: transformers' own pooling reads the token before.
    batch = pad(rows, EOS)
    scores = score_last(sequence_values(model, batch), batch["attention_mask"])
    torch.testing.assert_close(scores, torch.tensor(alone), atol=1e-5, rtol=0)

    # The saved folder gives the same scores in transformers.
    save_folder(model, causal, str(tmp_path / "rm"))
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    assert theirs.config.architectures == [type(theirs).__name__]
    assert theirs.config.num_labels == 1
    batch = pad(rows, PAD)
    with torch.no_grad():
        logits = theirs(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    torch.testing.assert_close(logits, torch.tensor(alone), atol=1e-4, rtol=0)


def test_item_14_the_reward_model_reads_eos(causal, rows):
    """The score depends on the end token, which is the last token that it reads."""
    model = load_reward_model(causal, CFG, trainable=False)
    batch, cut = pad(rows, PAD), pad([r.ids[:-1] for r in rows], PAD)
    values = sequence_values(model, batch)
    scores = score_last(values, batch["attention_mask"])
    for row, example in enumerate(rows):
        assert scores[row] == values[row, len(example.ids) - 1]
    assert (scores - score_last(sequence_values(model, cut), cut["attention_mask"])).abs().min() > 1e-4


def test_item_17_dropout_is_off(rows, tmp_path):
    path = make_model(tmp_path, attention_dropout=0.5)
    model = load_policy(path, LORA)
    batch = pad(rows, PAD)
    for trained in (model, load_reward_model(path, LORA), load_value_model(path, CFG, from_reward=False)):
        assert trained.training
        once, again = (_forward(trained, batch) for _ in range(2))
        assert torch.equal(once, again)
        assert all(m.p == 0 for m in trained.modules() if isinstance(m, torch.nn.Dropout))
    reference = load_reference(path, CFG)
    assert torch.equal(_forward(reference, batch), _forward(load_policy(path, CFG), batch))
    # It is the configuration that switched it off: transformers alone would drop.
    theirs = AutoModelForCausalLM.from_pretrained(path).train()
    assert not torch.equal(theirs(batch["input_ids"]).logits, theirs(batch["input_ids"]).logits)


def _forward(model, batch):
    with torch.no_grad():
        out = model(**{k: batch[k] for k in ("input_ids", "attention_mask", "position_ids") if k in batch})
    return getattr(out, "logits", out)


def test_item_28_ratio_is_one_at_the_first_minibatch(causal, rows):
    """Old log-probabilities are recomputed: exactly 1 for the same layout, within 1e-5 for another."""
    model = load_policy(causal, CFG)
    for group in micro_batches([len(r.ids) for r in rows], 30):
        batch = pad([rows[i] for i in group], PAD)
        mask = batch["loss_mask"]
        with torch.no_grad():
            old = logprobs(model, batch)
        new = logprobs(model, batch)
        assert new.requires_grad
        ratio = torch.exp(new - old)[mask.bool()]
        assert torch.equal(ratio, torch.ones_like(ratio))
        _, metrics = policy_loss(new, old, torch.randn_like(old), mask, clip=0.2, global_tokens=1)
        assert metrics["ratio"] == metrics["tokens"] == mask.sum()
        assert metrics["clipfrac"] == 0
        assert metrics["approx_kl"] == 0
        for i, row in zip(group, real(old, batch), strict=True):
            for layout in (pad([rows[i]], PAD), pad([rows[i], *rows], PAD, "left")):
                ratio = torch.exp(row - real(logprobs(model, layout), layout)[0])
                torch.testing.assert_close(ratio[1:], torch.ones_like(ratio[1:]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_logprobs_without_whole_logits(causal, rows, side):
    """Of the tokens that count, with the gradient of all parameters."""
    model, batch = load_policy(causal, CFG), pad(rows, PAD, side)
    want = naive_logprobs(model, batch) * batch["loss_mask"]
    weights = torch.randn(want.shape, generator=torch.Generator().manual_seed(3))
    (want * weights).sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    got = sequence_logprobs(model, batch)
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=0)
    (got * weights).sum().backward()
    for grad, parameter in zip(grads, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, grad, atol=1e-4, rtol=1e-4)
    assert model(batch["input_ids"]).logits.shape == (*want.shape, WORDS), "asked once, not for ever"


def test_logprobs_of_a_model_that_caps_its_logits(rows, tmp_path):
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.5, initializer_range=0.2, pad_token_id=PAD,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model, batch = load_policy(str(tmp_path), CFG), pad(rows, PAD)
    want = naive_logprobs(model, batch) * batch["loss_mask"]
    torch.testing.assert_close(sequence_logprobs(model, batch).double(), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("which", ["sft", "policy", "value"])
def test_item_30_gradient_for_any_split(causal, rows, which):
    """The same gradient for one batch, for micro-batches of any size, and for two ranks added up."""
    g = torch.Generator().manual_seed(2)
    tokens = float(sum(sum(r.mask) for r in rows))
    model = load_value_model(causal, CFG, False) if which == "value" else load_policy(causal, CFG)
    if which == "value":
        model.score.weight.data.normal_(generator=g)
    per_row = [torch.randn(2, len(r.ids), generator=g) for r in rows]

    def gradient(groups):
        model.zero_grad()
        for group in groups:
            batch = pad([rows[i] for i in group], PAD)
            mask = batch["loss_mask"]
            noise = torch.zeros(2, *mask.shape)
            for row, i in enumerate(group):
                noise[:, row, : per_row[i].shape[1]] = per_row[i]
            if which == "value":
                values = before_tokens(sequence_values(model, batch))
                loss, _ = value_loss(values, noise[0], noise[1], mask, clip=0.2, global_tokens=tokens)
            else:
                logp = logprobs(model, batch)
                if which == "sft":
                    loss = sft_loss(logp, mask, tokens)
                else:
                    old = logp.detach() + 0.1 * noise[0]
                    loss, _ = policy_loss(logp, old, noise[1], mask, clip=0.2, global_tokens=tokens)
            loss.backward()
        grads = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
        return torch.cat(grads)

    whole = gradient([list(range(len(rows)))])
    assert whole.norm() > 1e-3
    for groups in ([[0], [1], [2], [3], [4], [5]], [[4, 1], [0, 2, 3, 5], []], [[1, 5], [3, 2], [0, 4]]):
        assert (gradient(groups) - whole).norm() / whole.norm() < 1e-5


def test_item_31_value_model_starts_from_reward_or_policy(causal, rows, tmp_path):
    """From the reward model: its scores, normalised. From the policy: zero, on the policy's backbone."""
    batch = pad(rows, PAD)
    reward = load_reward_model(causal, CFG, trainable=False)
    folder = tmp_path / "rm"
    save_folder(reward, causal, str(folder))
    (folder / "reward_head.json").write_text(json.dumps({"mean": 1.5, "std": 0.25}))
    assert reward_scale(str(folder)) == RewardScale(1.5, 0.25)
    with torch.no_grad():
        scores = sequence_values(reward, batch)
        values = sequence_values(load_value_model(str(folder), CFG, from_reward=True), batch)
        torch.testing.assert_close(values, (scores - 1.5) / 0.25, atol=1e-4, rtol=1e-4)
        zero = load_value_model(causal, CFG, from_reward=False)
        assert (sequence_values(zero, batch) == 0).all()
    policy = dict(state_items(load_policy(causal, CFG)))
    for name, tensor in state_items(zero):
        assert name.startswith("score.") or torch.equal(tensor, policy[name])
    with pytest.raises(InputError, match="holds no reward head"):
        load_value_model(causal, CFG, from_reward=True)


def test_item_32_reference_is_frozen(causal):
    reference = load_reference(causal, LORA)
    assert not reference.training
    assert not any(p.requires_grad for p in reference.parameters())


def test_item_33_padding_on_either_side_changes_nothing(causal, rows):
    model = load_policy(causal, CFG, trainable=False)
    alone = [logprobs(model, pad([row], PAD))[0] for row in rows]
    for side in ("left", "right"):
        batch = pad(rows, PAD, side)
        for got, want in zip(real(logprobs(model, batch), batch), alone, strict=True):
            torch.testing.assert_close(got[1:], want[1:], atol=1e-5, rtol=0)
    # Rotary positions are relative, so that a shift alone would not show: look at the positions too.
    assert pad(rows, PAD, "left")["position_ids"][4].tolist()[-3:] == [0, 1, 2]


def test_lora_trains_adapters_and_saves_merged(causal, rows, tmp_path):
    batch = pad(rows, PAD)
    model = load_policy(causal, LORA)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trainable
    assert all("lora_" in n for n in trainable)
    plain = load_policy(causal, CFG, trainable=False)
    assert torch.equal(_forward(model, batch), _forward(plain, batch))
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    trained = _forward(model, batch)
    assert not torch.allclose(trained, _forward(plain, batch), atol=1e-2)
    with model.disable_adapter():  # the reference, without a second copy
        assert torch.equal(_forward(model, batch), _forward(plain, batch))
    save_folder(model, causal, str(tmp_path / "out"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert set(loaded.state_dict()) == set(plain.state_dict())
    torch.testing.assert_close(_forward(loaded, batch), trained, atol=1e-5, rtol=1e-5)


def test_lora_reward_model_trains_and_saves_its_head(causal, rows, tmp_path):
    batch = pad(rows, PAD)
    model = load_reward_model(causal, LORA)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert all("lora_" in n or "score" in n for n in trainable)
    assert any("score" in n for n in trainable)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        score_last(sequence_values(model, batch), batch["attention_mask"]).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    scores = sequence_values(model, batch)
    save_folder(model, causal, str(tmp_path / "rm"))
    again = load_reward_model(str(tmp_path / "rm"), CFG, trainable=False)
    torch.testing.assert_close(sequence_values(again, batch), scores, atol=1e-5, rtol=1e-5)


def test_saved_folder_has_tokenizer_template_and_is_whole(causal, rows, tmp_path):
    model = load_policy(causal, CFG)
    out = tmp_path / "deep" / "model"
    save_folder(model, causal, str(out), dict(state_items(model)))
    tokenizer, source = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(causal)
    assert tokenizer.chat_template == source.chat_template
    assert tokenizer("w5 <eos>").input_ids == source("w5 <eos>").input_ids
    batch = pad(rows, PAD)
    assert torch.equal(_forward(load_reference(str(out), CFG), batch), _forward(model, batch))


@pytest.mark.parametrize(
    ("given", "saved"),
    [
        ({"temperature": 0.9, "top_p": 0.6}, {"temperature": 0.9, "top_p": 0.6, "do_sample": True}),
        ({"top_k": 5, "min_p": 0.1}, {"top_k": 5, "min_p": 0.1, "do_sample": True}),
        ({"temperature": 0.9, "do_sample": True}, {"temperature": 0.9, "do_sample": True}),
        ({"temperature": 0.9, "do_sample": False}, {"temperature": None, "do_sample": None}),
        ({"length_penalty": 0.5}, {"length_penalty": None}),
        ({"pad_token_id": -1, "eos_token_id": [1, 5]}, {"pad_token_id": None, "eos_token_id": [1, 5]}),
    ],
)
def test_no_generation_config_costs_the_trained_weights(rows, tmp_path, given, saved):
    """transformers loads what it then refuses to save: a stage would fail at its very end."""
    path = make_model(tmp_path / "given")
    place = tmp_path / "given" / "generation_config.json"
    data = json.loads(place.read_text()) | given
    place.write_text(json.dumps(data))
    model = load_policy(path, CFG)
    save_folder(model, path, str(tmp_path / "out"))
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert {key: written.get(key) for key in saved} == saved
    assert written["eos_token_id"] == data["eos_token_id"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(_forward(loaded, pad(rows, PAD)), _forward(model, pad(rows, PAD)))
    loaded.save_pretrained(tmp_path / "again")


def test_state_items_give_a_tied_head(causal):
    model = load_policy(causal, CFG)
    items = dict(state_items(model))
    assert set(items) == set(model.state_dict())
    assert torch.equal(items["lm_head.weight"], model.state_dict()["lm_head.weight"])


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        (lambda p: p / "nowhere", "no such folder"),
        (lambda p: (p / "config.json").unlink(), "cannot be loaded"),
        (lambda p: (p / "config.json").write_text("{"), "cannot be loaded"),
        (lambda p: (p / "model.safetensors").unlink(), "cannot be loaded"),
        (lambda p: (p / "model.safetensors").write_bytes(b"\1" * 99), "cannot be loaded"),
    ],
)
def test_unloadable_folder_is_one_clear_line(breakage, message, tmp_path):
    path = make_model(tmp_path)
    broken = breakage(tmp_path)
    path = str(broken) if broken is not None and "nowhere" in str(broken) else path
    with pytest.raises(InputError, match=message) as e:
        load_policy(path, CFG)
    assert path in str(e.value)
    assert "\n" not in str(e.value)


def test_wrong_lora_targets_are_named(causal):
    with pytest.raises(InputError, match=r"lora.targets=\['nonesuch'\]"):
        load_policy(causal, TrainConfig(lora=LoraConfig(targets=["nonesuch"])))


def test_bf16_scores_are_finer_than_bf16(causal, rows):
    """The head multiplies in fp32: scores are not rounded to eight bits."""
    model = load_reward_model(causal, TrainConfig(dtype="bfloat16"), trainable=False)
    scores = sequence_values(model, pad(rows, PAD))
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.to(torch.bfloat16).float())


def test_gradient_checkpointing_gives_the_same_gradient(causal, rows):
    batch, grads = pad(rows, PAD), []
    for on in (False, True):
        model = load_policy(causal, TrainConfig(gradient_checkpointing=on, lora=LORA.lora))
        torch.manual_seed(4)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1)
            elif "lora_A" in name:
                parameter.data.normal_(std=0.3)
        sft_loss(logprobs(model, batch), batch["loss_mask"], 10).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(grads[0], grads[1])
    assert math.isfinite(grads[0].norm())
    assert grads[0].norm() > 0
