"""The scorer against plain float64 forwards, on every kind of attention that it claims."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from sft_probe.scoring.attention import PLAIN, ForwardMode
from sft_probe.scoring.packing import Continuation, batches, pack_shared
from sft_probe.scoring.score import Reference, Score, choose_mode, score
from sft_probe.scoring.targets import read_targets

VOCAB = 97
WINDOW = 16
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
GROUPED: dict[str, Any] = {**SMALL, "num_key_value_heads": 2, "head_dim": 8}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "gpt2": {
        "vocab_size": VOCAB,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 256,
        "initializer_range": 0.3,
    },
    "gpt_neox": {**SMALL, "rotary_pct": 0.5},
    "qwen2": GROUPED,
    "mistral": {**GROUPED, "sliding_window": WINDOW},
    "gemma2": {
        **GROUPED,
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 8,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {
        **GROUPED,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "cohere": {**GROUPED, "logit_scale": 0.25},
}
PLAIN_ONLY: dict[str, dict[str, Any]] = {
    "bloom": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "n_layer": 2,
        "n_head": 4,
        "initializer_range": 0.3,
    },
    "mamba": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "state_size": 4,
        "initializer_range": 0.3,
    },
}


def make_model(name: str, attention: str | None = None, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**(ARCHITECTURES | PLAIN_ONLY)[name], **changes})
    return AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=attention
    ).eval()


def make_items(terminator_id: int | None = 5) -> list[Continuation]:
    """Docs longer than the window, several, with continuations that share a start, repeat, or are
    one token."""
    random = np.random.default_rng(1)
    items = []
    for length in (40, 3, 1, 25, 40):
        prefix = random.integers(VOCAB, size=length).tolist()
        stem = random.integers(VOCAB, size=4).tolist()
        conts = [stem + random.integers(VOCAB, size=n).tolist() for n in (1, 30, 7)]
        items += [
            Continuation(prefix, cont, terminator_id) for cont in [*conts, stem, stem[:1], conts[0]]
        ]
    return items


def reference(model: Any, item: Continuation) -> tuple[list[float], list[bool], float]:
    """One plain forward in float64."""
    ids = [*item.prefix_ids, *item.continuation_ids]
    with torch.no_grad():
        logits = model.double()(torch.tensor([ids])).logits[0]
    logprobs, start = logits.log_softmax(-1), len(item.prefix_ids)
    rows = range(start, len(ids))
    greedy = [int(logits[i - 1].argmax()) == ids[i] for i in rows]
    return [float(logprobs[i - 1, ids[i]]) for i in rows], greedy, float(logprobs[-1, 5])


def check(model: Any, items: list[Continuation], mode: ForwardMode, max_tokens: int = 256) -> None:
    found: dict[int, Score] = dict(score(model.float(), items, max_tokens=max_tokens, mode=mode))
    assert sorted(found) == list(range(len(items)))
    for i, item in enumerate(items):
        logprobs, greedy, eos = reference(model, item)
        np.testing.assert_allclose(found[i].token_logprobs, logprobs, atol=2e-4)
        assert found[i].logprob == pytest.approx(sum(logprobs), abs=2e-3)
        assert found[i].greedy_tokens.tolist() == greedy
        if item.terminator_id is None:
            assert found[i].logprob_eos is None
        else:
            assert found[i].logprob_eos == pytest.approx(eos, abs=2e-4)


# transformers has no SDPA for Gemma-2, whose attention is soft-capped
COMBINATIONS = [(name, attention) for name in ARCHITECTURES for attention in ("sdpa", "eager")]
COMBINATIONS.remove(("gemma2", "sdpa"))


@pytest.mark.parametrize(("name", "attention"), COMBINATIONS)
def test_scores_with_shared_prefixes_equal_a_plain_float64_forward(
    name: str, attention: str
) -> None:
    model = make_model(name, attention)
    mode = choose_mode(model, longest=80)
    assert mode.shared
    assert mode.blocks == (attention == "sdpa")
    check(model, make_items(), mode)
    check(
        model,
        make_items(terminator_id=None),
        dataclasses.replace(mode, blocks=False),
        max_tokens=1024,
    )


@pytest.mark.parametrize("name", PLAIN_ONLY)
def test_models_that_cannot_share_prefixes_are_scored_without(name: str) -> None:
    model = make_model(name)
    mode = choose_mode(model, longest=80)
    assert mode == PLAIN
    check(model, make_items(), mode)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "attention"), [("mistral", "sdpa"), ("gemma3_text", "sdpa"), ("llama", "eager")]
)
def test_the_check_of_a_model_finds_a_wrong_attention_mask(
    name: str, attention: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window that the mask does not know of, or a bool mask where it is added: both are silent in
    transformers."""

    def wrong(model: Any, mask: torch.Tensor, positions: torch.Tensor, mode: ForwardMode) -> Any:
        return (
            dict.fromkeys(("full_attention", "sliding_attention"), mask)
            if mode.mask_per_layer_type
            else mask
        )

    model = make_model(name, attention)
    model.to(dtype)
    assert choose_mode(model, longest=80).shared
    monkeypatch.setattr("sft_probe.scoring.score.make_masks", wrong)
    assert choose_mode(model, longest=80) == PLAIN


def test_an_unknown_attention_is_scored_without_shared_prefixes() -> None:
    model = make_model("llama", "sdpa")
    model.config._attn_implementation = "flex_attention"
    assert choose_mode(model, longest=80) == PLAIN


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_16_bit_models_share_prefixes_too(name: str, dtype: torch.dtype) -> None:
    model = make_model(name, "sdpa")
    model.to(dtype)
    mode = choose_mode(model, longest=80)
    assert mode.shared
    found = dict(score(model, make_items(), max_tokens=256, mode=mode))
    plain = dict(score(model, make_items(), max_tokens=256, mode=PLAIN))
    differences = [np.abs(found[i].token_logprobs - plain[i].token_logprobs).mean() for i in found]
    assert float(np.mean(differences)) < 0.05
    assert found[0].token_logprobs.dtype == np.float32


def test_scoring_leaves_the_model_as_it_was() -> None:
    model = make_model("llama", "sdpa")
    next(
        score(model, make_items(), max_tokens=64, mode=ForwardMode(shared=True, blocks=True))
    )  # left in mid-mode
    assert model.config._attn_implementation == "sdpa"
    assert "forward" not in vars(model.base_model)
    ids = torch.tensor([[1, 2, 3]])
    assert model(ids).logits.shape == (1, 3, VOCAB)
    assert model.training is False


ids = st.lists(st.integers(0, 3), min_size=1, max_size=6)
drawn_items = st.lists(
    st.builds(
        Continuation, prefix_ids=ids, continuation_ids=ids, terminator_id=st.sampled_from([None, 5])
    ),
    min_size=1,
    max_size=12,
)


@given(items=drawn_items, max_tokens=st.integers(1, 40))
def test_packs_hold_every_item_once_and_no_prefix_twice(
    items: list[Continuation], max_tokens: int
) -> None:
    packs = list(pack_shared(items, max_tokens))
    assert sorted(i for pack in packs for i in pack.items) == list(range(len(items)))
    assert sorted(i for batch in batches(packs, 64) for pack in batch for i in pack.items) == list(
        range(len(items))
    )
    for pack in packs:
        assert pack.mask is not None
        assert len(pack.token_ids) <= max(
            max_tokens, *(len(items[i].input_ids) for i in pack.items)
        )
        seen = [tuple(pack.token_ids[row]) for row in pack.mask]
        assert len(set(seen)) == len(seen), "two nodes hold the same prefix"
        for i, rows in zip(pack.items, pack.rows, strict=True):
            for t, row in enumerate(rows):
                read = [*items[i].prefix_ids, *items[i].continuation_ids[:t]]
                assert pack.token_ids[pack.mask[row]].tolist() == read
                assert pack.position_ids[pack.mask[row]].tolist() == list(range(len(read)))
            assert len(rows) == len(items[i].target_ids)


LLAMA = make_model("llama", "sdpa")


@settings(deadline=None, max_examples=25)
@given(items=drawn_items, max_tokens=st.integers(1, 60), blocks=st.booleans())
def test_any_items_are_scored_within_any_token_budget(
    items: list[Continuation], max_tokens: int, blocks: bool
) -> None:
    check(LLAMA, items, ForwardMode(shared=True, blocks=blocks), max_tokens)


def test_requests_that_differ_only_in_the_split_point() -> None:
    """Stock lm-eval's shared-context cache reads wrong logits here (-15.43 for -18.07)."""
    text = list(range(10, 20))
    check(
        LLAMA,
        [Continuation(text[:n], text[n:]) for n in range(1, 10)],
        ForwardMode(shared=True, blocks=True),
    )


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma2", "bloom"])
def test_token_columns_equal_those_of_a_float64_forward(name: str) -> None:
    model, items = make_model(name), make_items()
    mode = choose_mode(model, longest=80)
    found = dict(score(model, items, max_tokens=256, mode=mode, with_columns=True))
    for i, item in enumerate(items):
        ids = [*item.prefix_ids, *item.continuation_ids]
        with torch.no_grad():
            rows = model.double()(torch.tensor([ids])).logits[0, len(item.prefix_ids) - 1 : -1]
        p, chosen = rows.softmax(-1), rows[range(len(rows)), list(item.continuation_ids)]
        columns = found[i].columns
        assert columns is not None
        np.testing.assert_allclose(columns.max_logprobs, p.amax(-1).log(), atol=2e-4)
        np.testing.assert_allclose(columns.entropies, -(p * p.log()).sum(-1), atol=2e-4)
        np.testing.assert_allclose(columns.norms, p.norm(dim=-1), atol=2e-4)
        assert columns.ranks.tolist() == (1 + (rows > chosen[:, None]).sum(-1)).tolist()
        assert columns.ranks.dtype == np.int32
        assert ((columns.ranks == 1) == found[i].greedy_tokens).all()


def test_token_columns_are_left_out_unless_they_are_wanted() -> None:
    model, items = make_model("llama"), make_items()
    mode = choose_mode(model, longest=80)
    alone = dict(score(model, items, max_tokens=256, mode=mode))
    both = dict(score(model, items, max_tokens=256, mode=mode, with_columns=True))
    for i, plain in alone.items():
        assert plain.columns is None
        np.testing.assert_array_equal(plain.token_logprobs, both[i].token_logprobs)


@given(st.integers(0, 2**32 - 1), st.floats(0, 60), st.integers(0, VOCAB - 1))
@settings(max_examples=50, deadline=None)
def test_entropy_is_at_most_log_v_and_rank_one_is_greedy(
    seed: int, scale: float, num_masked: int
) -> None:
    random = np.random.default_rng(seed)
    logits = torch.from_numpy(scale * random.standard_normal((40, VOCAB))).float()
    logits[:, 1 : num_masked + 1] = -torch.inf  # what a model never says
    rows = np.concatenate([np.arange(40), random.integers(40, size=90)])
    targets = np.where(random.random(len(rows)) < 0.5, 0, logits.argmax(-1).numpy()[rows])
    found = read_targets(
        [logits[:17].clone(), logits[17:].clone()], rows, targets, with_columns=True
    )
    columns = found.columns
    assert columns is not None
    assert (columns.entropies >= -1e-6).all()
    assert (columns.entropies <= np.log(VOCAB - num_masked) + 1e-5).all()
    assert ((columns.ranks == 1) == found.greedy).all()
    assert (columns.ranks <= VOCAB - num_masked).all()
    assert (columns.max_logprobs >= found.logprobs).all()
    assert (columns.norms <= np.exp(columns.max_logprobs / 2) + 1e-5).all()


def _moved(model: Any, name: str) -> Any:
    """The same architecture a little further on, as after some training."""
    other = make_model(name)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return other


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "gemma2",
        *(pytest.param(name, marks=pytest.mark.full) for name in ("gpt_neox", "bloom", "mistral")),
    ],
)
def test_distances_from_a_reference_equal_those_of_two_float64_forwards(name: str) -> None:
    items, start = make_items(), make_model(name)
    model = _moved(start, name)
    second = Reference(model=start, mode=choose_mode(start, longest=80))
    mode = choose_mode(model, longest=80)
    found = dict(score(model, items, max_tokens=256, mode=mode, reference=second))
    alone = dict(score(model, items, max_tokens=256, mode=mode))
    for i, item in enumerate(items):
        ids = torch.tensor([[*item.prefix_ids, *item.continuation_ids]])
        place = slice(len(item.prefix_ids) - 1, -1)
        with torch.no_grad():
            new, old = (one.double()(ids).logits[0, place] for one in (model, start))
        now, before = (torch.distributions.Categorical(logits=logits) for logits in (new, old))
        distances = found[i].distances
        assert distances is not None
        for values, pair in (
            (distances.kl_forward, (before, now)),
            (distances.kl_reverse, (now, before)),
        ):
            expected = torch.distributions.kl_divergence(*pair)
            assert expected.max() > 0.01, "they are apart"
            np.testing.assert_allclose(values, expected, atol=2e-4)
        likeliest = old.gather(-1, new.argmax(-1, keepdim=True))
        assert distances.reference_ranks.tolist() == (1 + (old > likeliest).sum(-1)).tolist()
        np.testing.assert_array_equal(found[i].token_logprobs, alone[i].token_logprobs)
        assert alone[i].distances is None


def test_a_model_has_no_distance_from_itself_nor_from_one_that_shares_no_prefixes() -> None:
    items, model = make_items(), make_model("llama")
    same = Reference(model=make_model("llama"), mode=choose_mode(model, longest=80))
    plain = Reference(model=make_model("llama"), mode=PLAIN)
    for second in (same, plain):
        for one in dict(
            score(model, items, max_tokens=256, mode=same.mode, reference=second)
        ).values():
            assert one.distances is not None
            assert max(*one.distances.kl_forward, *one.distances.kl_reverse) < 1e-6
            assert set(one.distances.reference_ranks) == {1}


@given(st.integers(0, 2**32 - 1), st.floats(0, 60), st.floats(0, 60), st.integers(0, VOCAB - 2))
@settings(max_examples=50, deadline=None)
def test_divergences_are_never_negative_and_rank_one_is_no_shift(
    seed: int, scale: float, change: float, num_masked: int
) -> None:
    random = np.random.default_rng(seed)
    old = torch.from_numpy(scale * random.standard_normal((20, VOCAB))).float()
    new = old + change * torch.from_numpy(random.standard_normal((20, VOCAB))).float()
    for logits in (old, new):
        logits[:, 1 : num_masked + 1] = -torch.inf  # what neither model ever says
    found = read_targets(
        [new.clone()], np.arange(20), np.zeros(20, np.int64), with_columns=True, reference=[old]
    ).distances
    assert found is not None
    assert (found.kl_forward >= 0).all()
    assert (found.kl_reverse >= 0).all()
    assert np.isfinite([*found.kl_forward, *found.kl_reverse]).all()
    same_greedy = (new.argmax(-1) == old.argmax(-1)).numpy()
    assert (found.reference_ranks[same_greedy] == 1).all()
    assert (found.reference_ranks <= VOCAB - num_masked).all()
