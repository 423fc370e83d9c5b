"""Whether a text shows the task it was written for: thoughts, wrappers, labels, and talk about the text around it.

Three kinds of signal, in any language: tokens and tags that no reader is meant to see; the words for rewriting where a
writer announces or labels a text; a remark after the text on what it keeps of the original, how long it is or whether
it will do. What stands in the source or in the user's own turn is no leak.
"""

import json

import regex

_REWRITE = (
    r"(?:para?phras\w*|rephras\w*|re-?word\w*|re-?writ\w*|rewrote|rework\w*|reformul\w*|umformul\w*|umschreib\w*"
    r"|umgeschrieb\w*|formulierung|par[a\u00e1]fras\w*|r\u00e9\u00e9cri\w*|reescri\w*|riscri\w*|riformul\w*|herschr\w*|herformul\w*"
    r"|przeformu\w*|sparafraz\w*|omskriv\w*|omformul\w*|viết lại|diễn đạt lại|yeniden yaz\w*|tulis ulang"
    r"|перефраз\w*|переписан\w*|переформул\w*|إعادة صياغة|改写|改寫|重写|重寫|转述|轉述|言い換え\w*|書き換え\w*|言い直し\w*|바꿔 쓴|다시 쓴|재작성)"
)
_ABOUT_TEXT = (
    rf"(?:{_REWRITE}|versi[o\u00f3]ne?s?|wording|phrasing|attempt|my take|draft|passage|other words|different words"
    r"|otras palabras|anderen worten|d'autres mots|altre parole|outras palavras|requested|\d+[- ]?words?|sentence"
    r"|random|unrelated|alternative|short text|new text|texte?o? (?:original|reformul)\w*)"
)
_YES = r"(?:sure|certainly|of course|okay|ok|absolutely|no problem|gladly|bien s\u00fbr|gerne?|nat\u00fcrlich|claro|por supuesto|certo|конечно|好的|当然|はい|네)"
_HERE = (
    r"(?:here(?:'s| is| are| you go)|this is|below is|the following|(?:I|we)(?:'ve| have) (?:\w+ )?"
    rf"{_REWRITE}|voici|voil\u00e0|hier ist|hier is|aqu[i\u00ed] (?:est\u00e1|tienes|va)|ecco|вот|oto|以下|这是|這是|下面|다음은)"
)
_TOKEN = regex.compile(
    r"<[|\uff5c][^<>\n]{1,40}[|\uff5c]>|<(?:start|end)_of_\w+>|</?s>|\[/?INST\]|<</?SYS>>|<(?:eos|bos|pad|unk|sep|cls|mask)>"
    r"|\[(?:EOS|BOS|PAD|UNK|SEP|CLS|MASK)\]|assistantfinal|\Aanalysis(?=[A-Z])"
    r"|</?(?:think|thinking|thoughts?|reason|reasoning|scratchpad|reflection|analysis|text|conversation|passage|answer"
    r"|response|output|result|paraphrase\w*|re-?writ\w*|rephras\w*|final\w*|draft|assistant|user|system|human)\b[^<>]{0,40}>"
)
_WRAPPED = regex.compile(r"\s*<([A-Za-z_][\w-]*)>[\s\S]*</\1>\s*")
_FENCED = regex.compile(r"\s*```(?:text|txt|markdown|md|plaintext|plain)?\s*\n[\s\S]*```\s*", regex.IGNORECASE)
_LABEL = regex.compile(
    rf"\W*(?:(?:the|my|final|revised|new|first|second|updated|improved|suggested|alternative|{_REWRITE})\s+)*"
    rf"(?:{_REWRITE}|output|answer|response|result|draft|version|option|variant|variante?|text|passage|sentence|assistant"
    r"|ai|model|user|human|system|reply|r\u00e9ponse|antwort|respuesta|risposta|resposta|ответ|вариант|回答|答案|답변|返答)"
    r"\s*(?:[A-D]|\d)?(?:[*_\"]*\s*[:\uff1a]|[*_#]*\s*\n)",
    regex.IGNORECASE,
)
_THOUGHT = regex.compile(
    r"\W*(?:(?:okay|ok|alright|hmm|wait|so|well|first)\b\W*)*(?:"
    r"the user (?:wants|asks|is asking|asked|requested|needs|would like|has asked)|the (?:task|prompt|instructions?) (?:is|are|asks?|says?)"
    r"|(?:we|I) (?:need|have|should|must|want|am asked|'m asked) ?(?:to )?(?:\w+ )?(?:keep|preserve|write|put|produce|output|paraphrase"
    r"|rewrite|rephrase|reword|make|create|respond|generate|change) (?:the|this|it|a|about|that|\d)"
    rf"|let me (?:think|try to|start by|{_REWRITE})|let's {_REWRITE}|we need to {_REWRITE})",
    regex.IGNORECASE,
)
_AS_ASKED = regex.compile(
    r"\W*(?:as (?:you )?(?:requested|asked)|per your request|in other words, as)\b", regex.IGNORECASE
)
_PREAMBLE = regex.compile(rf"\W*(?:{_YES}\b\W*)*{_HERE}", regex.IGNORECASE)
_FIRST_PERSON = regex.compile(r"\b(?:I|I've|I'll|we|let me|let's|my|below)\b", regex.IGNORECASE)
_NOTE = regex.compile(
    r"\W*(?:note|n\.?b\.?|hinweis|anmerkung|remarque|nota|opmerking|uwaga|примечание|注|注意|备注|備註|備考|注記|说明|説明|참고|disclaimer)"
    r"\W{0,3}[:\uff1a]",
    regex.IGNORECASE,
)
_ACCOUNT = regex.compile(
    r"\W*(?:explanation|(?:key |main )?changes(?: made)?|what (?:I|has) changed|rationale|reasoning|commentary|erkl\u00e4rung|explication"
    r"|explicaci\u00f3n|word count|修改说明|变更)\W*[:\uff1a]",
    regex.IGNORECASE,
)
_ON_TEXT = regex.compile(
    r"\b(?:meaning|tone|structure|wording|length|style|mistakes?|errors?|source text|meant|words)\b|original|原文|原意|语气|語気|意味|元の|원문"
    r"|оригинал|исходн|смысл|\bsens\b|\bsinn\b|\bton\b|\btono\b|\bsentido\b|\bsignificado\b|\bsenso\b|\btom\b|"
    + _REWRITE,
    regex.IGNORECASE,
)
_DID = regex.compile(
    r"\b(?:I|we)(?:'ve| have)? (?:also )?(?:kept|preserved|maintained|retained|changed|restructured|replaced|rewrote|reworded|rephrased"
    r"|paraphrased|adjusted|varied|tried|aimed|made sure|used|followed|avoided)\b"
    r"|\b(?:this|the) (?:\w+ )?(?:version|text|passage|rewrite|paraphrase|rewording|sentence|output) (?:above )?(?:\w+ )?"
    r"(?:keeps|preserves|maintains|retains|conveys|uses|stays|changes|is written)",
    regex.IGNORECASE,
)
_COUNT = regex.compile(
    r"(?:[(\[\uff08]|\n)\W*(?:approx\w*\.?|about|around|roughly|total|exactly|circa|environ|etwa|ca\.?)?\W*(?:word count\W*)?\d+\s*"
    r"(?:words?|w\u00f6rter|mots|palabras|parole|palavras|слов\w*|字|語|단어)\W*$|\bword count\b\W*\d*\W*$",
    regex.IGNORECASE,
)
_OFFER = regex.compile(
    r"\blet me know (?:if|whether|should|what you)|\b(?:would you like|do you want|shall I|should I) (?:me )?(?:to )?"
    r"|\bI hope (?:this|that|it) |\bhope (?:this|that) helps|\bis there anything else|\bfeel free to|\bhappy to (?:adjust|revise|tweak|help)"
    r"|\bif you(?:'d| would)? (?:like|want|prefer|need)\b",
    regex.IGNORECASE,
)
_REVISION = regex.compile(
    rf"{_REWRITE}|\b(?:adjust\w*|tweak\w*|revis\w*|versions?|tone|style|shorter|longer|changes|requirements?|edits?|modif\w*|this one"
    r"|wording|different (?:one|way))\b",
    regex.IGNORECASE,
)
_SENTENCE = regex.compile(r"(?<=[.!?\u3002\uff01\uff1f])[\s\"')]+|\n+")
_LEAKED_WORDS = 6


def is_leak(text: str, template_text: str, context: str, *, is_answer: bool) -> bool:
    """Whether a text speaks of its task, is wrapped in marks of it, or repeats six words in a row of its template.

    Args:
        text: what was written.
        template_text: the prompt template.
        context: the user's turns and the text that this one is made from. What they hold may be taken up.
        is_answer: whether the text answers the user, as `variant` does; an offer of more help is then a part of it.
    """
    text = text.replace("\u2019", "'")
    if any(match[0] not in context for match in _TOKEN.finditer(text)):
        return True
    if not word_runs(text).isdisjoint(word_runs(template_text)):
        return True
    return _is_wrapped(text, context) or _is_announced(text, context) or _has_remark(text, context, is_answer)


def word_runs(text: str) -> set[tuple[str, ...]]:
    """Every six words in a row."""
    parts = regex.findall(r"\w+", text.lower())
    return {tuple(parts[i : i + _LEAKED_WORDS]) for i in range(len(parts) - _LEAKED_WORDS + 1)}


def _is_wrapped(text: str, context: str) -> bool:
    """The whole text stands in a tag, a code fence or a JSON object that the context has not."""
    if "<" not in context and _WRAPPED.fullmatch(text):
        return True
    if "```" not in context and text.count("```") == 2 and _FENCED.fullmatch(text):
        return True
    if "{" in context or not (text.startswith("{") and text.endswith("}")):
        return False
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _is_announced(text: str, context: str) -> bool:
    """The text starts with a label, a thought, or a line that says what follows."""
    if _THOUGHT.match(text) or _AS_ASKED.match(text) or (_LABEL.match(text) and not _LABEL.match(context)):
        return True
    first = _SENTENCE.split(text.lstrip())[:2]  # the second after a mere "Sure!"
    opening = " ".join(first) if len(first[0].split()) < 3 else first[0]
    opening = opening[:200]
    about = _search(_ABOUT_TEXT, opening)
    if about is None or about[0].lower() in context.lower():
        return False
    if _PREAMBLE.match(text):
        return True
    line = text.lstrip().split("\n", 1)[0].rstrip("*_ ")
    is_rewriting = _search(_REWRITE, opening) is not None
    return is_rewriting and (line.endswith((":", "\uff1a")) or bool(_FIRST_PERSON.search(opening)))


def _has_remark(text: str, context: str, is_answer: bool) -> bool:
    """The text ends with a word on itself: a note, an account of changes, its length, an offer to do it again."""
    if _COUNT.search(text):
        return True
    paragraphs = [part for part in regex.split(r"\n\s*\n|\n(?=[-*_]{3,}\s*\n)", text) if part.strip("-*_ \n")]
    sentences = [part for part in _SENTENCE.split(text) if part.strip()]
    for paragraph in paragraphs[1:]:
        if _ACCOUNT.match(paragraph) or (_NOTE.match(paragraph) and _ON_TEXT.search(paragraph)):
            return True
    tail = " ".join([*sentences[-2:][-1:], *(paragraphs[1:][-1:])]) if len(sentences) > 1 else ""
    tail = " ".join([*sentences[1:][-2:], tail])
    if _DID.search(tail) and _ON_TEXT.search(tail):
        return True
    offer = _OFFER.search(tail)
    if offer is None or _OFFER.search(context):
        return False
    return bool(_REVISION.search(tail)) if is_answer else not _is_conditional(offer[0])


def _is_conditional(offer: str) -> bool:
    """`if you like` is an offer only of somebody who speaks of revising; in other texts it is a plain clause."""
    return offer.lower().startswith("if you")


def _search(pattern: str, text: str) -> "regex.Match[str] | None":
    return regex.search(pattern, text, regex.IGNORECASE)
