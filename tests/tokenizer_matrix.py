"""Tokenizers x formats: tiny ones with the split rules, normalisers and post-processors of real
families.

Each is trained on the embedded set in a second or less. `MEMBERS` says for each what the prompt
format must resolve to and which token must end a response; `tokenizer_rows` runs them for
docs/models.md.
"""

import functools
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sft_probe.errors import UserError
from sft_probe.probe_set import load_probe_set
from sft_probe.prompts import encode_probe_set, resolve_format, terminator_id

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_O200K = (
    r"[^\r\n"
    r"\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n"
    r"\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| "
    r"?[\p{P}\p{S}]+[\r\n"
    r"]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    "llama3": [_LLAMA3],
    "qwen": [_LLAMA3.replace("{1,3}", "")],
    "o200k": [_O200K],
    "deepseek": [r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK],
}


@functools.cache
def _texts() -> list[str]:
    """Prompts with the marks and line ends of real chats, often enough that a trainer merges them,
    and responses."""
    docs = load_probe_set("helpful-mini").docs
    prompts = [doc.messages[-1]["content"] for doc in docs]
    chats = [f"<|user|>\n{prompt}\n<|assistant|>\n" for prompt in prompts]
    asked = [f"{prompt}\n\n" for prompt in prompts] + [
        f"### Instruction:\n{p}\n\n### Response:\n" for p in prompts
    ]
    responses = [text for doc in docs for text in doc.responses.values()]
    return [*chats * 3, *asked * 3, *responses, *(f"-{text}" for text in responses)]


def _byte_level(kind: str) -> Tokenizer:
    """As GPT-2 (`gpt2`), with the split rule of a later family, or with none, so that tokens span
    words (`super`)."""
    tokenizer = Tokenizer(models.BPE())
    if kind == "super":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    elif kind == "gpt2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        splits = [pre_tokenizers.Split(Regex(rule), "isolated") for rule in _SPLITS[kind]]
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    if kind == "qwen":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        _texts(),
        trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False),
    )
    return tokenizer


def _sentencepiece(kind: str) -> Tokenizer:
    """BPE over `▁` with byte fall-back: `prepend` (Llama-2), `first` (Mistral) or no space before a
    text (`gemma`)."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))  # noqa: S106
    if kind == "first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        replace = normalizers.Replace(" ", "▁")
        prepend = [normalizers.Prepend("▁")] if kind == "prepend" else []
        tokenizer.normalizer = normalizers.Sequence([*prepend, replace])
    strip = [] if kind == "gemma" else [decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    space = " " if kind == "gemma" else ""
    words = (
        space + word for text in _texts() for word in text.split()
    )  # real ones merge no line ends
    specials = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(
        words, trainers.BpeTrainer(vocab_size=900, special_tokens=specials, show_progress=False)
    )
    return tokenizer


def _wordpiece() -> Tokenizer:
    """As BERT: lower case, no white space."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # noqa: S106
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        _texts(),
        trainers.WordPieceTrainer(vocab_size=700, special_tokens=["[UNK]"], show_progress=False),
    )
    return tokenizer


def _unigram() -> Tokenizer:
    """As T5 and XLNet: Unigram over `▁`; white space is one space."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=600,
        special_tokens=["<unk>"],
        unk_token="<unk>",  # noqa: S106
        show_progress=False,
        n_sub_iterations=1,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    return tokenizer


_MAKERS: dict[str, Callable[[], Tokenizer]] = {
    **{kind: functools.partial(_byte_level, kind) for kind in ("gpt2", "super", *_SPLITS)},
    **{kind: functools.partial(_sentencepiece, kind) for kind in ("prepend", "first", "gemma")},
    "wordpiece": _wordpiece,
    "unigram": _unigram,
}


@functools.cache
def _trained(kind: str) -> str:
    return str(_MAKERS[kind]().to_str())


def make(
    kind: str,
    *,
    markers: tuple[str, ...] = (),
    bos: str | None = None,
    eos: str,
    template: str | None = None,
    adds: str = "",
    swallow: bool = False,
    special: bool = True,
) -> PreTrainedTokenizerFast:
    """A tokenizer of one family.

    Args:
        kind: of splits, merges and white space.
        markers: added tokens of the template, special ones but not registered as "extra".
        bos: the BOS token.
        eos: the EOS token.
        template: the chat template.
        adds: what the post-processor puts around a text, `A`, such as `<s> A </s>`.
        swallow: markers take the white space after them, as Phi-3's do.
        special: whether markers are special tokens.
    """
    tokenizer = Tokenizer.from_str(_trained(kind))
    names = [name for name in dict.fromkeys([bos, eos]) if name]
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in names]
    )
    added = [
        AddedToken(name, special=special, rstrip=swallow, normalized=False) for name in markers
    ]
    (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
    if adds:
        parts = [part for part in adds.split() if part != "A"]
        tokenizer.add_special_tokens(
            [part for part in parts if tokenizer.token_to_id(part) is None]
        )
        tokenizer.post_processor = processors.TemplateProcessing(
            single=adds.replace(" A", " $A").replace("A ", "$A ").replace("$$", "$"),
            special_tokens=[(part, tokenizer.token_to_id(part)) for part in dict.fromkeys(parts)],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=eos,
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def _turns(user: str, assistant: str, opening: str, start: str = "") -> str:
    """A template from what is written for each role and before an answer; `CONTENT` is the turn's
    text."""
    user, assistant = (text.replace("CONTENT", "{{ m['content'] }}") for text in (user, assistant))
    return (
        f"{start}{{% for m in messages %}}{{% if m['role'] == 'assistant' %}}{assistant}{{% else "
        f"%}}{user}{{% endif %}}"
        f"{{% endfor %}}{{% if add_generation_prompt %}}{opening}{{% endif %}}"
    )


_CHATML = "<|im_start|>{{ m['role'] }}{{ '\\n' }}CONTENT<|im_end|>{{ '\\n' }}"
_HEADER = "<|start_header_id|>ROLE<|end_header_id|>{{ '\\n\\n' }}"
_LLAMA3_TURN = _HEADER.replace("ROLE", "{{ m['role'] }}") + "CONTENT<|eot_id|>"
_ASSISTANT = "<|im_start|>assistant{{ '\\n' }}"
_THOUGHT = "<think>{{ '\\n\\n' }}</think>{{ '\\n\\n' }}"
TEMPLATES = {
    "chatml": _turns(_CHATML, _CHATML, _ASSISTANT),
    "llama3": _turns(
        _LLAMA3_TURN, _LLAMA3_TURN, _HEADER.replace("ROLE", "assistant"), "{{ bos_token }}"
    ),
    "gemma": _turns(
        "<start_of_turn>user{{ '\\n' }}CONTENT<end_of_turn>{{ '\\n' }}",
        "<start_of_turn>model{{ '\\n' }}CONTENT<end_of_turn>{{ '\\n' }}",
        "<start_of_turn>model{{ '\\n' }}",
        "{{ bos_token }}",
    ),
    "mistral": _turns("[INST] CONTENT [/INST]", "CONTENT{{ eos_token }}", "", "{{ bos_token }}"),
    "llama2": _turns("{{ bos_token }}[INST] CONTENT [/INST]", " CONTENT {{ eos_token }}", ""),
    "zephyr": _turns(
        "<|user|>{{ '\\n' }}CONTENT{{ eos_token }}{{ '\\n' }}",
        "<|assistant|>{{ '\\n' }}CONTENT{{ eos_token }}{{ '\\n' }}",
        "<|assistant|>{{ '\\n' }}",
    ),
    "tulu": _turns(
        "<|user|>{{ '\\n' }}CONTENT{{ '\\n' }}",
        "<|assistant|>{{ '\\n' }}CONTENT{{ eos_token }}{{ '\\n' }}",
        "<|assistant|>{{ '\\n' }}",
        "{{ bos_token }}",
    ),
    "instruction": _turns(
        "### Instruction:{{ '\\n' }}CONTENT{{ '\\n\\n' }}",
        "### Response:{{ '\\n' }}CONTENT{{ '\\n\\n' }}",
        "### Response:{{ '\\n' }}",
    ),
    "phi3": _turns(
        "<|user|>{{ '\\n' }}CONTENT<|end|>{{ '\\n' }}",
        "<|assistant|>{{ '\\n' }}CONTENT<|end|>{{ '\\n' }}",
        "<|assistant|>{{ '\\n' }}",
    ),
    "vicuna": _turns("USER: CONTENT ", "ASSISTANT: CONTENT{{ eos_token }}", "ASSISTANT:"),
    "deepseek": _turns(
        "<｜User｜>CONTENT",
        "<｜Assistant｜>CONTENT{{ eos_token }}",
        "<｜Assistant｜>",
        "{{ bos_token }}",
    ),
    "r1": _turns(
        "<｜User｜>CONTENT",
        "<｜Assistant｜>{{ m['content'].split('</think>')[-1] }}{{ eos_token }}",
        "<｜Assistant｜><think>{{ '\\n' }}",
        "{{ bos_token }}",
    ),
    "qwen3": _turns(_CHATML, _ASSISTANT + _THOUGHT + "CONTENT<|im_end|>{{ '\\n' }}", _ASSISTANT),
    "think": _turns(
        _CHATML,
        _ASSISTANT + _THOUGHT + "CONTENT<|im_end|>{{ '\\n' }}",
        _ASSISTANT + "<think>{{ '\\n' }}",
    ),
    "harmony": _turns(
        "<|start|>user<|message|>CONTENT<|end|>",
        "<|start|>assistant<|channel|>final<|message|>CONTENT"
        "{% if loop.last and not add_generation_prompt %}<|return|>{% else %}<|end|>{% endif %}",
        "<|start|>assistant",
        "<|start|>system<|message|>Current date: {{ strftime_now('%Y-%m-%d') }}<|end|>",
    ),
    "clock": _turns(_CHATML, _CHATML, _ASSISTANT, "{{ strftime_now('%H:%M:%S') }}{{ '\\n' }}"),
    "open_end": _turns(
        "<|user|>CONTENT<|end|>",
        "<|assistant|>CONTENT{% if not loop.last %}<|end|>{% endif %}",
        "<|assistant|>",
    ),
}
"""By the family that a template is of."""
_MARKERS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "mistral": ("[INST]", "[/INST]"),
    "phi3": ("<|user|>", "<|assistant|>", "<|end|>"),
    "deepseek": ("<｜User｜>", "<｜Assistant｜>"),
    "think": ("<|im_start|>", "<|im_end|>", "<think>", "</think>"),
    "harmony": ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"),
}


@dataclass(frozen=True, kw_only=True)
class Member:
    """One tokenizer with one format, and what must come of it."""

    name: str
    make: Callable[[], PreTrainedTokenizerFast]
    format: str
    """`hh`, `plain`, `chat`, or the name of a Jinja file in `FILES`."""
    chosen: str
    """What follows the format's name once it is resolved; `@` stands for a time."""
    terminator: str
    is_exact: bool = True
    """Whether decoding gives a text back as it was, white space around it aside."""


def _member(
    name: str,
    chosen: str,
    terminator: str,
    *,
    format_name: str = "chat",
    is_exact: bool = True,
    **how: Any,
) -> Member:
    kind, _, template = name.partition(" ")
    if format_name == "chat":
        how = {"template": TEMPLATES[template], "markers": _MARKERS.get(template, ()), **how}
    make_it = functools.partial(make, kind, **{"eos": "</s>", **how})
    full_name = name if format_name == "chat" else f"{kind} {format_name}"
    if "adds" in how:
        full_name += f" ({how['adds']})"
    return Member(
        name=full_name,
        make=make_it,
        format=format_name,
        chosen=chosen,
        terminator=terminator,
        is_exact=is_exact,
    )


_GPT: dict[str, Any] = {"eos": "<|endoftext|>"}
_TEXT: dict[str, Any] = {
    "bos": "<|begin_of_text|>",
    "eos": "<|end_of_text|>",
    "adds": "<|begin_of_text|> A",
}
_DEEP: dict[str, Any] = {
    "bos": "<｜begin▁of▁sentence｜>",
    "eos": "<｜end▁of▁sentence｜>",
    "adds": "<｜begin▁of▁sentence｜> A",
}
_SPM: dict[str, Any] = {"bos": "<s>", "adds": "<s> A"}
_THINK: dict[str, Any] = {"markers": _MARKERS["think"], **_GPT}
MEMBERS = [
    _member("gpt2", "", "<|endoftext|>", format_name="hh", **_GPT),
    _member("gpt2", "", "<|endoftext|>", format_name="plain", **_GPT),
    _member("gpt2 chatml", "", "<|im_end|>", **_GPT),
    _member("gpt2 think", "+full_render", "<|im_end|>", **_GPT),
    _member("gpt2 clock", "@", "<|im_end|>", markers=_MARKERS["chatml"], **_GPT),
    _member("gpt2 instruction", "", "<|endoftext|>", **_GPT),
    _member("gpt2 open_end", "", "<|end|>", markers=_MARKERS["phi3"], **_GPT),
    _member(
        "gpt2 chatml", "", "<|im_end|>", special=False, adds="<|begin|> A", bos="<|begin|>", **_GPT
    ),
    _member("super", "", "<|endoftext|>", format_name="hh", **_GPT),
    _member("super", "+in_use", "<|endoftext|>", format_name="plain", **_GPT),
    _member("llama3", "", "<|end_of_text|>", format_name="hh", **_TEXT),
    _member("llama3", "+in_use", "<|end_of_text|>", format_name="plain", **_TEXT),
    _member("llama3", "+in_use", "<|end_of_text|>", format_name="alpaca", **_TEXT),
    _member("llama3", "+in_use", "<|end_of_text|>", format_name="dash", **_TEXT),
    _member("llama3 llama3", "", "<|eot_id|>", **_TEXT),
    _member(
        "llama3 tulu", "+in_use", "<|end_of_text|>", bos="<|end_of_text|>", eos="<|end_of_text|>"
    ),
    _member("llama3 zephyr", "+in_use", "</s>", **_SPM),
    _member("llama3 instruction", "+in_use", "<|end_of_text|>", **_TEXT),
    _member("llama3", "+in_use", "</s>", format_name="plain", bos="<s>", adds="<s> A </s>"),
    _member("llama3", "", "</s>", format_name="hh", adds="A </s>"),
    _member("llama3 vicuna", "+full_render", "</s>", **_SPM),
    _member("qwen", "+in_use", "<|endoftext|>", format_name="plain", **_GPT),
    _member("qwen chatml", "", "<|im_end|>", **_GPT),
    _member("qwen qwen3", "+full_render", "<|im_end|>", **_THINK),
    _member("deepseek", "+in_use", "<｜end▁of▁sentence｜>", format_name="plain", **_DEEP),
    _member("deepseek deepseek", "", "<｜end▁of▁sentence｜>", **_DEEP),
    _member(
        "deepseek r1",
        "+full_render",
        "<｜end▁of▁sentence｜>",
        markers=(*_MARKERS["deepseek"], "<think>"),
        **_DEEP,
    ),
    _member("o200k", "+in_use", "<|return|>", format_name="plain", eos="<|return|>"),
    _member("o200k harmony", "@+full_render", "<|return|>", eos="<|endoftext|>"),
    _member("prepend", "", "</s>", format_name="hh", **_SPM),
    _member("prepend", "", "</s>", format_name="plain", **_SPM),
    _member("prepend llama2", "+full_render", "</s>", **_SPM),
    _member("prepend zephyr", "", "</s>", **_SPM),
    _member("prepend phi3", "", "<|end|>", swallow=True, **_SPM),
    _member("first mistral", "", "</s>", **_SPM),
    _member("first", "", "</s>", format_name="alpaca", **_SPM),
    _member("gemma gemma", "", "<end_of_turn>", bos="<bos>", eos="<eos>", adds="<bos> A"),
    _member("gemma", "", "<eos>", format_name="hh", bos="<bos>", eos="<eos>", adds="<bos> A"),
    _member(
        "wordpiece",
        "",
        "[SEP]",
        format_name="plain",
        is_exact=False,
        eos="[SEP]",
        adds="[CLS] A [SEP]",
    ),
    _member("unigram", "", "</s>", format_name="hh", is_exact=False, adds="A </s>"),
    _member("unigram", "", "</s>", format_name="plain", is_exact=False),
]
FILES = {
    "alpaca": "Below is an instruction.\n\n### Instruction:\n{{ messages[-1].content }}\n\n### "
    "Response:\n",
    # `-S` may be one token, whatever is chosen as the join
    "dash": "{{ messages[-1].content }}\n-",
}


def spec_of(member: Member, folder: Path) -> str:
    """What `--prompt_format` is given; writes the Jinja file where the format is one."""
    if member.format not in FILES:
        return member.format
    path = folder / f"{member.format}.j2"
    path.write_text(FILES[member.format])
    return str(path)


def save_model(tokenizer: Any, folder: Path) -> Path:
    """Write a tiny Llama with random weights and this tokenizer; returns its directory."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_mixed_set(path: Path) -> Path:
    """Half of the prompts end in a question mark, half in nothing."""
    docs = [
        {
            "doc_id": f"d{i}",
            "conversation_id": f"c{i}",
            "split": "train" if i % 4 < 2 else "heldout",
            "messages": [
                {
                    "role": "user",
                    "content": f"What is {i} plus {i}?" if i % 2 else f"Tell me about {i}",
                }
            ],
            "chosen": f"I think that is {2 * i}, or so my teacher told me.",
            "other": f"The number {i} has always been a friend of mine.",
        }
        for i in range(8)
    ]
    path.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    return path


def tokenizer_rows() -> list[tuple[str, str, str]]:
    """Name, result and note of each member, as run on the embedded set."""
    with tempfile.TemporaryDirectory() as folder:
        return list(_rows(Path(folder)))


def _rows(folder: Path) -> Iterator[tuple[str, str, str]]:
    probe_set = load_probe_set("helpful-mini")
    for member in MEMBERS:
        tokenizer = member.make()
        try:
            prompt_format = resolve_format(spec_of(member, folder), tokenizer, probe_set.docs)
        except UserError as error:
            yield member.name, "refused", str(error)
            continue
        kept, _ = encode_probe_set(probe_set, prompt_format, tokenizer, 4096)
        end = tokenizer.decode([terminator_id(prompt_format.name, tokenizer)])
        chosen = prompt_format.name.partition("+")[2]
        result = (
            "right" if len(kept) == len(probe_set.docs) and end == member.terminator else "wrong"
        )
        notes = [*(f"`+{rule}`" for rule in chosen.split("+") if rule), f"ends in `{end}`"]
        if not member.is_exact:
            notes.append("the tokenizer itself alters case or white space")
        yield member.name, result, ", ".join(notes)
