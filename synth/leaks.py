"""Whether a text shows the task it was written for: thoughts, wrappers, labels, and talk about the
text around it.

Three kinds of signal, in any language: tokens and tags that no reader is meant to see; the words
for rewriting where a writer announces or labels a text; a remark after the text on what it keeps of
the original, how long it is or whether it will do. What stands in the source or in the user's own
turn is no leak.
"""

import json

import regex

_REWRITE = (
    r"(?:para?phras\w*|rephras\w*|re-?word\w*|re-?writ\w*|rewrote|rework\w*|reformul\w*|umformul\w*|umschreib\w*"
    r"|umgeschrieb\w*|formulierung|par[a\u00e1]fras\w*|r\u00e9\u00e9cri\w*|reescri\w*|riscri\w*|riformul\w*"
    r"|herschr\w*|herformul\w*"
    r"|przeformu\w*|sparafraz\w*|omskriv\w*|omformul\w*|viết lại|diễn đạt lại|yeniden "
    r"yaz\w*|tulis "
    r"ulang"
    r"|перефраз\w*|переписан\w*|переформул\w*|إعادة صياغة|改写|改寫|重写|重寫|转述|轉述"
    r"|言い換え\w*|書き換え\w*|言い直し\w*|바꿔 쓴|다시 쓴|재작성)"
)
_ABOUT_TEXT = (
    rf"(?:{_REWRITE}|versi[o\u00f3]ne?s?|wording|phrasing|attempt|my take|draft|passage|other "
    r"words|different "
    r"words"
    r"|otras palabras|anderen worten|d'autres mots|altre parole|outras palavras|requested|\d+[- "
    r"]?words?|sentence"
    r"|random|unrelated|alternative|(?:few|some|several|two|three|couple of|possible) "
    r"options(?=\W*[:\n"
    r"])"
    r"|ways? to (?:say|put|phrase|express)|how I(?:'d| would) "
    r"(?:say|put|phrase|word)|output|short text|new text"
    r"|paragraph|texte?o? (?:original|reformul)\w*)"
)
_ABOUT_TASK = rf"(?:{_REWRITE}|my (?:attempt|take)|requested|\d+[- ]words?|random|output sentence)"
_GIVEN_TEXT = regex.compile(
    r"\A\W*this (?:passage|text|paragraph|version) (?:is|describes|explores)\b"
    r"|\b(?:sentence|text|passage|paragraph)s? (?:that )?you(?:'ve| have)? "
    r"(?:provided|gave|given|shared|sent)\b"
    r"|\bplease (?:provide|share|send)(?: me)?(?: with)? (?:the|a|some|your) (?:\w+ "
    r")?(?:sentence|text|passage)\b",
    regex.IGNORECASE,
)
_REWRITTEN_TEXT = regex.compile(
    rf"{_REWRITE} (?:\w+ )?(?:texte?|version|passage|sentence|form|paragraph)\b"
    rf"|\btext\b[^.\n]{{0,30}}{_REWRITE}",
    regex.IGNORECASE,
)
_OPENING = 250
"""Characters."""
_YES = (
    r"(?:sure|sure thing|certainly|of course|okay|ok|alright|got it|understood|absolutely|no "
    r"problem|gladly"
    r"|bien s\u00fbr|gerne?|nat\u00fcrlich|claro|por supuesto|certo|конечно|好的|当然|はい|네)"
)
_HERE = (
    r"(?:here(?:'s| is| are| it is| you go)|this is|below is|the following|(?:I|we)(?:'ve| have) "
    r"(?:\w+ "
    r")?"
    rf"{_REWRITE}|voici|voil\u00e0|hier ist|hier is|aqu[i\u00ed] (?:est\u00e1|tienes|va)"
    r"|ecco|вот|oto|以下|这是|這是|下面"
    rf"|다음은)"
)
_TOKEN = regex.compile(
    r"[\u25c1\u27e8\[]/?think\w*[\u25b7\u27e9\]]|\A\W*thinking\.\.\.|\bdone thinking\b|\\boxed\{|"
    r"<[|\uff5c][^<>\n"
    r"]{1,40}[|\uff5c]>|<(?:start|end)_of_\w+>|</?s>|\[/?INST\]|<</?SYS>>|<(?:eos|bos|pad|unk|sep"
    r"|cls|mask)>"
    r"|\Athoughts?\s*\n"
    r"|\[(?:BEGIN|START|END|EOS|BOS|PAD|UNK|SEP|CLS|MASK)\]|assistantfinal|\Aanalysis(?=[A-Z])"
    r"|\n\s*(?:Human|Assistant):|<\|?(?:unused|extra_id_|reserved_|0x)\w+\|?>"
    r"|</?(?:think|thinking|thoughts?|reason|reasoning|scratchpad|reflection|analysis|text|conversation|passage"
    r"|answer"
    r"|response|output|result|paraphrase\w*|re-?writ\w*|rephras\w*|final\w*|draft|assistant|user|system"
    r"|human)\b[^<>]{0,40}>"
)
_WRAPPED = regex.compile(r"\s*<([A-Za-z_][\w-]*)>[\s\S]*</\1>\s*")
_FENCED = regex.compile(
    r"\s*```(?:text|txt|markdown|md|plaintext|plain)?\s*\n[\s\S]*```\s*", regex.IGNORECASE
)
_LABEL = regex.compile(
    rf"\W*(?:(?:the|my|final|revised|new|first|second|updated|improved|suggested|alternative|{_REWRITE})\s+)*"
    rf"(?:{_REWRITE}|output|answer|response|result|draft|version|option|variante?|text|passage|sentence|assistant"
    r"|original|topic|theme|th(?:inking|ought) "
    r"process|thoughts|analysis|ai|model|user|human|system|reply"
    r"|r\u00e9ponse|antwort|respuesta|risposta|resposta|ответ|вариант|回答|答案|답변|返答)"
    r"\s*(?:[A-D]|\d)?(?:\s*[(\[][^()\n]{1,40}[)\]])?(?:[*_\"]*\s*[:\uff1a]|[*_#]*\s*\n)"
    r"|\W*(?:\w+ "
    r"){0,2}(?:text[eo]?|testo|tekst|текст|version|versi[o\u00f3]n|vers\u00e3o|fassung|wording|phrasing"
    r"|title|titre|titel"
    rf"|t\u00edtulo|titolo|{_REWRITE}\w{{0,6}})(?: \w+)?\s*[:\uff1a]",
    regex.IGNORECASE,
)
_INNER_LABEL = regex.compile(
    rf"\n[^\w\n]*(?:\w+ ){{0,2}}{_REWRITE}\w{{0,6}}(?: \w+)?[^\w\n]*[:\uff1a]", regex.IGNORECASE
)
_ANNOUNCEMENT = regex.compile(
    r"[^\n]{1,120}[:\uff1a][*_ ]*\n\s*\n(?!\s*(?:[-*+\u2022\u2013|>]|\(?\w{1,3}[.)]\s|```))"
)
"""A short paragraph that ends in a colon, with prose after it: in any language it says what
follows."""
_OWN_LABEL = regex.compile(
    r"\W*(?:here(?:'s| is) )?([^\n:\uff1a]{1,80})[:\uff1a]", regex.IGNORECASE
)
_HEADING = regex.compile(
    r"[^\n.!?\u3002\uff01\uff1f\u2026,:;]{1,60}\w\n\s*\n|\W*(?:(?<=\*\*|__)[^\n"
    r"*_]+(?:\*\*|__)|(?<=#)[^\n"
    r"]+)\W*\n"
)
_REMARK = regex.compile(
    r"(?<=[.!?\u3002\uff01\uff1f\"*])\s*\W{0,3}[(\[\uff08\u3010]([^()\n]+)[)\]\uff09\u3011]\W{0,3}$"
)
_ASIDE = regex.compile(r"\n\s*\n\W{0,3}[(\[\uff08\u3010][^\n]+[)\]\uff09\u3011]\W{0,3}$")
"""A last paragraph in brackets."""
_THOUGHT = regex.compile(
    r"\W*(?:(?:okay|ok|alright|hmm|wait|so|well|first|(?:let me|let's) (?:think|see)[^.:\n"
    r"]*)\b\W*)*(?:"
    r"the (?:original|source|given|input)(?: text| passage| sentence| response)?"
    r" (?:says|states|talks|mentions|is about)|"
    r"the user (?:wants|asks|is asking|asked|requested|needs|would like|has asked)|the "
    r"(?:task|prompt"
    r"|instructions?) (?:is|are|asks?|says?)"
    r"|(?:we|I) (?:need|have|should|must|want|am asked|'m asked) ?(?:to )?(?:\w+ "
    r")?(?:keep|preserve|write|put"
    r"|produce|output|paraphrase"
    r"|rewrite|rephrase|reword|make|create|respond|generate|change) (?:the|this|it|a|about|that|\d)"
    rf"|let me [^.\n]{{0,60}}{_REWRITE}|let me (?:craft|compose|formulate|draft|produce) "
    r"|I(?:'ll| "
    r"will) "
    rf"{_REWRITE}"
    rf"|let's {_REWRITE}|we need to {_REWRITE})",
    regex.IGNORECASE,
)
_AS_ASKED = regex.compile(
    r"\W*(?:as (?:you )?(?:requested|asked)|per your request|in other words, as)\b",
    regex.IGNORECASE,
)
_PREAMBLE = regex.compile(rf"\W*(?:{_YES}\b\W*)*{_HERE}", regex.IGNORECASE)
_FIRST_PERSON = regex.compile(r"\b(?:I|I've|I'll|we|let me|let's|my|below)\b", regex.IGNORECASE)
_NOTE = regex.compile(
    r"\W*(?:note|n\.?b\.?|hinweis|anmerkung|remarque|nota|opmerking|uwaga|примечание|注|注意|备注|備註|備考|注記|说明|説明|참고"
    r"|disclaimer)"
    r"\W{0,3}[:\uff1a]|\W*(?:please )?note that I\b|bitte beachten|veuillez noter|tenga en cuenta",
    regex.IGNORECASE,
)
_ACCOUNT = regex.compile(
    r"\W*(?:explanation|key points(?: preserved| kept)?|(?:key |main )?changes(?: made)?|what "
    r"(?:I|has) "
    r"changed"
    r"|rationale|reasoning|commentary"
    r"|erkl\u00e4rung|explication"
    r"|explicaci\u00f3n|word count|修改说明|变更)\W*[:\uff1a]",
    regex.IGNORECASE,
)
_ON_TEXT = regex.compile(
    r"\b(?:fehler|erreurs?|errores|errori|clauses?|phrases?|synonyms|vocabulary|meaning|tone|structure|wording"
    r"|length|style|mistakes?|errors?|source text|meant|words)\b|original|原文|原意"
    r"|语气|語気|意味|元の|원문"
    r"|оригинал|исходн|смысл|\bsens\b|\bsinn\b|\bton\b|\btono\b|\bsentido\b|\bsignificado\b|\bsenso\b|\btom\b|"
    + _REWRITE,
    regex.IGNORECASE,
)
_DID = regex.compile(
    r"\b(?:I|we)(?:'ve| have)? (?:also "
    r")?(?:kept|preserved|maintained|retained|changed|restructured|replaced"
    r"|rewrote|reworded|rephrased"
    r"|paraphrased|adjusted|varied|tried|aimed|made sure|used|followed|avoided"
    r"|swapped|simplified|shortened|split|combined|reordered|switched)\b"
    r"|\b(?:this|the) (?:\w+ )?(?:version|text|passage|rewrite|paraphrase|rewording|sentence"
    r"|output) (?:above )?(?:\w+ )?"
    r"(?:keeps|preserves|maintains|retains|conveys|uses|stays|changes|is written)",
    regex.IGNORECASE,
)
_COUNT = regex.compile(
    r"(?:[(\[\uff08]|\n)\W*(?:approx\w*\.?|about|around|roughly|total|exactly|circa|environ|etwa"
    r"|ca\.?)?\W*(?:word count\W*)?\d+\s*"
    r"(?:words?|w\u00f6rter|mots|palabras|parole|palavras|слов\w*|字|語|단어)\W*$|\bword "
    r"count\b\W*\d*\W*$"
    r"|\b(?:that|this|which|it)(?:'s| is| should be) "
    r"(?:about|around|exactly|roughly|approximately) \d+ words\W*$",
    regex.IGNORECASE,
)
_OFFER = regex.compile(
    r"\bwant me to\b|\blet me know (?:if|whether|should|what you)"
    r"|\b(?:would you like|do you want|shall I|should I) (?:me )?(?:to )?"
    r"|\bI hope (?:this|that|it) |\bhope (?:this|that) helps|\bis there anything else|\bhappy to "
    r"(?:adjust|revise"
    r"|tweak|help)"
    r"|\bdoes (?:this|that) work|希望.{0,12}(?:符合|满意|滿意|帮助|有用)"
    r"|j'esp\u00e8re que|espero que|ich hoffe|spero che|надеюсь"
    r"|お役に立て|ご満足|도움이 되"
    r"|\bif you(?:'d| would)? (?:like|want|prefer|need)\b",
    regex.IGNORECASE,
)
_TO_READER = regex.compile(
    r"\blet me know (?:if|whether|what you)|\bhope (?:this|that|it) (?:\w+ "
    r")?(?:helps|works|meets|fits|suits|is what)"
    r"|ich hoffe,? (?:das|dies|es) "
    r"|j'esp\u00e8re que (?:cela|\u00e7a)|espero que (?:esto|isto|te|le|lhe)"
    r"|希望|お役に立て|ご満足|도움이 되",
    regex.IGNORECASE,
)
_REVISION = regex.compile(
    rf"{_REWRITE}|\bvers|versi|这个版本|要求|another|\b(?:adjust\w*|tweak\w*|revis\w*|versions?|tone|style|shorter|longer"
    rf"|changes|requirements?|edits?"
    rf"|modif\w*|this one"
    r"|wording|different (?:one|way))\b",
    regex.IGNORECASE,
)
_SENTENCE = regex.compile(r"(?<=[.!?\u3002\uff01\uff1f])[\s\"')]+|\n+")
_LEAKED_WORDS, _LONG_LETTERS = 6, 4


def is_leak(text: str, template_text: str, context: str, *, is_answer: bool) -> bool:
    """Whether a text speaks of its task, is wrapped in marks of it, or repeats six words in a row
    of its template.

    Args:
        text: what was written.
        template_text: the prompt template.
        context: the user's turns and the text that this one is made from. What they hold may be
        taken up. is_answer: whether the text answers the user, as `variant` does; an offer of more
        help is then a part of it.
    """
    text = text.replace("\u2019", "'")
    if any(match[0] not in context for match in _TOKEN.finditer(text)):
        return True
    if not word_runs(text).isdisjoint(word_runs(template_text)):
        return True
    return (
        _is_wrapped(text, context)
        or _is_labelled(text, template_text, context)
        or _is_announced(text, context, is_answer)
        or _has_remark(text, context, is_answer)
    )


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


def _is_labelled(text: str, template_text: str, context: str) -> bool:
    """The text starts with a label, or an announcement, in the words of its template."""
    found = _OWN_LABEL.match(text)
    if found is None or found[0] in context:
        return False
    parts = [part for part in regex.findall(r"\w+", found[1].lower()) if len(part) >= _LONG_LETTERS]
    known = set(regex.findall(r"\w+", template_text.lower()))
    return len(parts) > 1 and known.issuperset(parts)


def _is_announced(text: str, context: str, is_answer: bool) -> bool:
    """The text starts with a label, a thought, or a line that says what follows."""
    if (
        _THOUGHT.match(text)
        or _AS_ASKED.match(text)
        or (_LABEL.match(text) and not _LABEL.match(context))
    ):
        return True
    if _INNER_LABEL.search(text) and _search(_REWRITE, context) is None:
        return True
    if not is_answer and _is_headed(text, context):
        return True
    about = _ABOUT_TEXT if not is_answer else _ABOUT_TASK
    said = ""
    for sentence in _SENTENCE.split(text[:_OPENING].lstrip())[:3]:
        said += sentence + " "
        found = _search(about, said)
        if (
            found is not None
            and found[0].lower() not in context.lower()
            and _PREAMBLE.match(sentence)
        ):
            return True
    plans = _search(_REWRITE, said) is not None and bool(_FIRST_PERSON.search(said))
    if plans and not is_answer and _search(_REWRITE, context) is None:
        return True
    opening = said if len(said.split()) <= 3 else _SENTENCE.split(text[:_OPENING].lstrip())[0]
    line = text.lstrip().split("\n", 1)[0].rstrip("*_ ")
    found = _search(_REWRITE, opening)
    is_rewriting = found is not None and found[0].lower() not in context.lower()
    return is_rewriting and (line.endswith((":", "\uff1a")) or bool(_FIRST_PERSON.search(opening)))


def _is_headed(text: str, context: str) -> bool:
    """The text starts with a line for what follows, in any language, or speaks of the text that was
    given."""
    opening = text[:_OPENING]
    if _GIVEN_TEXT.search(opening) or (_HEADING.match(text) and not _HEADING.match(context)):
        return True
    rewritten = _REWRITTEN_TEXT.search(opening)
    if rewritten is not None and _search(_REWRITE, context) is None:
        return True
    return bool(_ANNOUNCEMENT.match(text)) and not regex.search(r"[:\uff1a]\s*(?:\n|$)", context)


def _has_remark(text: str, context: str, is_answer: bool) -> bool:
    """The text ends with a word on itself: a note, an account of changes, its length, an offer to
    do it again."""
    remark = _REMARK.search(text)
    is_aside = bool(_ASIDE.search(text) and not _ASIDE.search(context)) or bool(
        remark and _ON_TEXT.search(remark[1])
    )
    if _COUNT.search(text) or (is_aside and not is_answer):
        return True
    paragraphs = [
        part for part in regex.split(r"\n\s*\n|\n(?=[-*_]{3,}\s*\n)", text) if part.strip("-*_ \n")
    ]
    sentences = [part for part in _SENTENCE.split(text) if part.strip()]
    if _ACCOUNT.match(text) and not _ACCOUNT.match(context):
        return True
    for paragraph in paragraphs[1:]:
        is_rewriting = (
            _search(rf"\A\W*{_REWRITE}", paragraph) is not None
            and _search(_REWRITE, context) is None
        )
        if (
            is_rewriting
            or _ACCOUNT.match(paragraph)
            or (_NOTE.match(paragraph) and _ON_TEXT.search(paragraph))
        ):
            return True
    tail = " ".join([*sentences[-2:][-1:], *(paragraphs[1:][-1:])]) if len(sentences) > 1 else ""
    tail = " ".join([*sentences[1:][-2:], tail])
    if _DID.search(tail) and _ON_TEXT.search(tail):
        return True
    if _OFFER.search(tail) is None or _OFFER.search(context):
        return False
    return bool(_REVISION.search(tail)) or (not is_answer and _TO_READER.search(tail) is not None)


def _search(pattern: str, text: str) -> "regex.Match[str] | None":
    return regex.search(pattern, text, regex.IGNORECASE)
