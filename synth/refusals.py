"""Whether a text refuses, in the languages that models are asked in.

A refusal says that it is sorry, that it cannot, what it cannot do (help, answer, write), and that it is a machine or has
rules. One of these alone is no refusal, but for the last: "I can't say for certain" is an answer, and so is "I can't
recommend one without knowing your budget".
"""

import re
from dataclasses import dataclass

_START = 400
"""Characters: who refuses does so at the start."""


@dataclass(frozen=True)
class _Language:
    sorry: str
    cannot: str
    """The speaker is not able or willing."""
    task: str
    """What is asked of a model."""
    machine: str
    """The speaker is a machine, or goes by rules."""


_ENGLISH = _Language(
    sorry=r"\b(?:sorry|i apologi[sz]e|apologies|unfortunately|regrettably|i(?:'m| am) afraid|i understand|thank you for)\b",
    cannot=r"\bi(?:'m| am| must| have to| would|'d)? (?:(?:really|just|simply|truly|respectfully|also|strictly|afraid i) )*"
    r"(?:can(?:not|'t| not)|won't|will not|not (?:be )?able to|unable to|not going to|not allowed to|not permitted to|not programmed to"
    r"|not designed to|don't|do not|not comfortable|not in a position to|decline|refuse|pass|rather not|prefer not)\b"
    r"(?!(?: \w+)? (?:wait|help (?:but|\w+ing)|imagine|believe|stand|remember|find|say|tell))"
    r"|\bi won't be able to\b|\bit(?:'s| is| would)(?: be)? not (?:be )?(?:appropriate|possible|right) for me\b",
    task=r"(?:(?: and will not)?(?: \w+){0,4}? (?:help|assist|provid\w*|fulfil\w*|comply|answer\w*|creat\w+|writ\w+|generat\w+"
    r"|produc\w+|paraphras\w+|rewrit\w+|rephras\w+|reword\w*|engag\w+|discuss\w*|continu\w+|support|respond\w*|process|participat\w+"
    r"|do (?:that|this|so)|give such|give you (?:that|this|advice)|comment|request|have (?:personal )?(?:opinions?|feelings|beliefs)"
    r"|have the ability|feel comfortable|comfortable|with this topic)\b)",
    machine=r"\bas an? (?:[\w-]+ ){0,3}?(?:ai|artificial intelligence|language model|chatbot)\b"
    r"(?: (?:language )?(?:model|assistant|system))?(?:,| (?:trained|developed|created|made|designed|i|my|it)\b)"
    r"|\bi(?:'m| am) (?:just |only |merely |simply )?an? (?:[\w-]+ ){0,3}?(?:ai|language model|chatbot)\b(?! \w+(?:er|or|ist|ent)\b)"
    r"|\bi(?:'m| am| was) programmed to\b|\bmy (?:\w+ )?(?:guidelines|programming|polic(?:y|ies)|safety|ethical)\b"
    r"|\bmy (?:purpose|goal|aim) is to be (?:\w+ )?(?:and )?(?:helpful|harmless)|\b(?:not|nothing|isn't) (?:something|a thing) "
    r"(?:that )?i(?:'m| am| can| will| would)?\b|\bsomething (?:that )?i (?:won't|can't|cannot|will not)\b"
    r"|\b(?:ir(?:responsible)|unethical|inappropriate|wrong) (?:of|for) me\b|\bappropriate for me to\b"
    r"|\bi(?:'m| am)? (?:must|have to|had to|need to) (?:\w+ )?decline (?:to|this|your|the request)|\bi (?:must|have to) decline\b"
    r"|\A\W*(?:i apologi[sz]e|my apologies)[,;.]? (?:but|however)\b",
)
_LANGUAGES = (
    _ENGLISH,
    _Language(  # French
        r"d\u00e9sol\u00e9|navr\u00e9|je regrette|malheureusement|je m'excuse|toutes mes excuses",
        r"\bje (?:ne|n') ?(?:peux|puis|saurais|vais|suis|pourrai) (?:\w+ )?pas\b|\bje ne (?:peux|puis|saurais|suis|vais)\b|il m'est impossible|je (?:dois |pr\u00e9f\u00e8re )(?:d\u00e9cliner|refuser|ne pas)",
        r"aider|r\u00e9pondre|fournir|reformuler|r\u00e9\u00e9crire|assister|\u00e9crire|g\u00e9n\u00e9rer|produire|traiter|discuter|continuer|demande|d'avis|de conseils?",
        r"en tant qu(?:e |')(?:ia\b|intelligence artificielle|(?:grand )?mod\u00e8le|assistant)|je suis une? (?:ia\b|intelligence artificielle|mod\u00e8le)",
    ),
    _Language(  # German
        r"tut mir (?:sehr )?leid|entschuldigung|verzeihung|leider|bedaure",
        r"\bich (?:kann|darf|werde|m\u00f6chte|will)\b[^.!?]{0,70}\b(?:nicht|keine?[nrms]?)\b|\b(?:kann|darf|werde|m\u00f6chte) ich\b[^.!?]{0,70}\b(?:nicht|keine?[nrms]?)\b|nicht in der lage|ich muss[^.!?]{0,40}ablehnen",
        r"\bhelfen|helf\b|weiterhelfen|beantworten|umschreiben|umformulieren|schreiben|erstellen|bereitstellen|unterst\u00fctzen|anfrage|erf\u00fcllen|generieren",
        r"\bals (?:ki\b|k\u00fcnstliche intelligenz|sprachmodell|ki-\w+)|ich bin (?:nur )?(?:eine? )?(?:ki\b|k\u00fcnstliche|sprachmodell)|meine(?:n|r)? richtlinien",
    ),
    _Language(  # Spanish
        r"lo siento|lamento|lamentablemente|disculp|perd\u00f3n|me temo|desafortunadamente",
        r"\bno (?:puedo|podr\u00e9|podr\u00eda|soy capaz|me es posible|estoy (?:autorizad|programad|en condiciones)\w*|voy a|me siento c\u00f3mod\w)|me es imposible|debo (?:rechazar|negarme)",
        r"ayudar|asistir|responder|proporcionar|reescribir|parafrasear|escribir|generar|cumplir|opinar|hacer (?:eso|esto)|crear|continuar|atender|solicitud|petici\u00f3n|consejos",
        r"\bcomo (?:una? )?(?:ia\b|inteligencia artificial|modelo de lenguaje|asistente)|soy (?:solo )?una? (?:ia\b|inteligencia|modelo)|mis (?:normas|directrices|pol\u00edticas|principios)",
    ),
    _Language(  # Italian
        r"mi dispiace|spiacente|purtroppo|mi scuso|chiedo scusa",
        r"\bnon (?:posso|sono in grado|mi \u00e8 possibile|riesco|intendo|potrei)\b|devo rifiutare",
        r"aiutar|assister|risponder|fornir|riscriver|scriver|generar|soddisfar|continuar|farlo|richiesta",
        r"\bcome (?:un'?a? ?)?(?:ia\b|intelligenza artificiale|modello|assistente)|sono (?:solo )?un'?a? ?(?:ia\b|intelligenza|modello)|mie linee guida",
    ),
    _Language(  # Portuguese
        r"desculp|sinto muito|lamento|infelizmente|pe\u00e7o perd\u00e3o",
        r"\bn\u00e3o (?:posso|consigo|sou capaz|estou (?:autorizad|programad|apt)\w*|me \u00e9 poss\u00edvel|vou|poderei)\b|devo recusar",
        r"ajud|respond|fornec|reescrev|escrev|gerar|atend|cumpr|conselhos|fazer isso|continuar|pedido|solicita\u00e7\u00e3o",
        r"\bcomo (?:uma? )?(?:ia\b|intelig\u00eancia artificial|modelo de linguagem|assistente)|sou (?:apenas )?uma? (?:ia\b|intelig\u00eancia|modelo)|minhas diretrizes",
    ),
    _Language(  # Dutch
        r"het spijt me|\bsorry\b|helaas|excuses",
        r"\bik (?:kan|mag|zal|wil)\b[^.!?]{0,60}\b(?:niet|geen)\b|\bkan ik\b[^.!?]{0,60}\b(?:niet|geen)\b|niet in staat",
        r"helpen|beantwoorden|antwoord|schrijven|herschrijven|herformuleren|verzoek|assisteren|bieden",
        r"\bals (?:een )?(?:ai\b|ai-\w+|taalmodel|kunstmatige)|ik ben (?:slechts )?een (?:ai\b|taalmodel)|mijn richtlijnen",
    ),
    _Language(  # Swedish, Danish, Norwegian
        r"ledsen|tyv\u00e4rr|f\u00f6rl\u00e5t|beklager|desv\u00e6rre|dessverre|undskyld",
        r"\b(?:jag|jeg) (?:kan|f\u00e5r|kommer|vill)\b[^.!?]{0,40}\b(?:inte|ikke)\b|\bkan (?:jag|jeg)\b[^.!?]{0,40}\b(?:inte|ikke)\b",
        r"hj\u00e4lpa|hj\u00e6lpe|hjelpe|svara|svare|skriva|skrive|bist\u00e5|beg\u00e4ran|foresp\u00f8rsel",
        r"\bsom (?:en )?(?:ai\b|ai-\w+|spr\u00e5kmodell?|sprogmodel)|mina riktlinjer",
    ),
    _Language(  # Polish, Czech
        r"przykro mi|przepraszam|niestety|omlouv\u00e1m|bohu\u017eel|promi\u0148te",
        r"\bnie (?:mog\u0119|jestem w stanie|potrafi\u0119|wolno mi|b\u0119d\u0119)\b|musz\u0119 odm\u00f3wi\u0107|\bnemohu\b|\bnem\u016f\u017eu\b|nejsem schop",
        r"pom\u00f3c|odpowiedzie\u0107|zrobi\u0107|spe\u0142ni\u0107|napisa\u0107|przepisa\u0107|udzieli\u0107|pomoci|odpov\u011bd\u011bt|napsat",
        r"\bjako (?:ai\b|sztuczna|model|asystent|um\u011bl\u00e1|jazykov\u00fd)|moimi zasadami",
    ),
    _Language(  # Russian, Ukrainian
        r"извините|простите|к сожалению|прошу прощения|сожалею|вибачте|на жаль|перепрошую",
        r"\bне (?:могу|смогу|в состоянии|имею|буду|готов\w*|вправе|можу|маю|зможу)\b|вынужден\w* отказ|мушу відмов",
        r"помочь|помогать|ответить|отвечать|выполнить|предостав|написать|переписать|обсуждать|создавать|собственного мнения|допомог|відповісти|виконати",
        r"\bкак (?:ии\b|искусственный интеллект|(?:большая )?языковая модель|ии-|ассистент|нейросеть)|\bя (?:всего лишь )?(?:ии\b|языковая модель)|\bяк (?:ші\b|мовна модель|штучний)",
    ),
    _Language(  # Turkish
        r"\u00fczg\u00fcn\u00fcm|\u00f6z\u00fcr dilerim|maalesef|kusura bakma",
        r"\w+(?:am|em)(?:am|em|\u0131yorum|iyorum)\b|\w+[ae]m[ae]m\b|m\u00fcmk\u00fcn de\u011fil",
        r"yard\u0131m|yan\u0131t|cevap|yaz|yerine getir|istek|iste\u011fi",
        r"(?:bir )?(?:yapay zeka|dil modeli)\w*(?: \w+)? olarak",
    ),
    _Language(  # Vietnamese, Indonesian, Malay
        r"xin l\u1ed7i|r\u1ea5t ti\u1ebfc|\bmaaf\b|mohon maaf|sayangnya",
        r"kh\u00f4ng th\u1ec3|(?:tidak|tak) (?:dapat|bisa|boleh)",
        r"gi\u00fap|h\u1ed7 tr\u1ee3|tr\u1ea3 l\u1eddi|cung c\u1ea5p|y\u00eau c\u1ea7u|membantu|menjawab|memberikan|menulis|permintaan",
        r"l\u00e0 m\u1ed9t (?:ai\b|m\u00f4 h\u00ecnh|tr\u00ed tu\u1ec7)|sebagai (?:sebuah )?(?:ai\b|model bahasa|asisten)",
    ),
    _Language(  # Chinese
        r"抱歉|对不起|對不起|很遗憾|很遺憾|不好意思",
        r"(?:无法|無法|不能|没办法|沒辦法|不便|拒绝|拒絕|不会提供|不可以)",
        r"回答|帮助|幫助|帮您|帮你|提供|协助|協助|改写|改寫|完成|满足|生成|撰写|讨论|继续|请求|要求",
        r"作为(?:一个|一名|一款)?(?:人工智能|AI|大?型?语言模型|聊天)|作為(?:一個)?(?:人工智慧|AI|語言模型)|我(?:只)?是(?:一个|一個)?(?:人工智能|AI|语言模型)",
    ),
    _Language(  # Japanese
        r"申し訳|すみません|ごめんなさい|残念ながら|恐れ入り",
        r"できません|できかねます|いたしかねます|致しかねます|しかねます|お断り|控えさせ|お受けでき",
        r"お手伝い|お答え|お応え|回答|提供|対応|書き換え|ご要望|ご希望|ご質問|リクエスト",
        r"AI(?:として|アシスタント|ですので|なので|モデル)|言語モデル|人工知能として",
    ),
    _Language(  # Korean
        r"죄송|유감|미안|안타깝",
        r"수 없(?:습니다|어요|네요|음)|수는 없|못합니다|어렵습니다",
        r"도와|도움|답변|대답|제공|작성|응답|수행|요청",
        r"AI(?:로서|이기| 언어| 모델)|인공지능(?:으로서|이기)|언어 모델",
    ),
    _Language(  # Arabic, Persian
        r"آسف|عذر|أعتذر|للأسف|متأسف|متاسف|ببخشید",
        r"لا (?:أستطيع|يمكنني|أقدر)|لا يمكن|لست قادر|نمی.?توانم",
        r"مساعد|إجابة|الإجابة|تقديم|كتابة|إعادة|طلب|کمک|پاسخ",
        r"(?:بصفتي|كوني|باعتباري|كنموذج|به عنوان یک)",
    ),
    _Language(  # Hindi
        r"क्षमा|माफ|माफ़|खेद|दुर्भाग्य",
        r"नहीं (?:कर|दे|लिख|बता) ?(?:सकता|सकती|सकते|पाऊंगा|पाऊँगा)|असमर्थ|नहीं सकता",
        r"मदद|सहायता|उत्तर|जवाब|अनुरोध|लिख",
        r"(?:एक )?(?:एआई|AI|भाषा मॉडल|कृत्रिम).{0,20}(?:के रूप में|होने के नाते|हूँ|हूं)",
    ),
    _Language(  # Greek, Hebrew, Thai, Romanian, Hungarian, Finnish
        r"λυπάμαι|συγγνώμη|δυστυχώς|מצטער|סליחה|לצערי|ขออภัย|ขอโทษ|เสียใจ|\u00eemi pare r\u0103u|din p\u0103cate|sajn\u00e1lom|sajnos|eln\u00e9z\u00e9st|pahoittelen|valitettavasti|anteeksi",
        r"δεν μπορώ|δεν είμαι σε θέση|לא (?:יכול|יכולה|אוכל)|ไม่สามารถ|\bnu pot\b|nu sunt capabil|nem (?:tudok|tudom|seg\u00edthetek|\u00e1ll m\u00f3domban)|\ben (?:voi|pysty)\b",
        r"βοηθήσω|απαντήσω|לעזור|לענות|לסייע|ช่วย|ตอบ|ajuta|r\u0103spunde|seg\u00edt|v\u00e1laszol|auttaa|vastata",
        r"ως (?:μοντέλο|τεχνητή)|כמודל שפה|כבינה|ในฐานะ(?:ที่เป็น)? ?(?:AI|โมเดล|ปัญญา)|ca (?:model|asistent|ia\b)|(?:nyelvi modell|mesters\u00e9ges)\w*k\u00e9nt|teko\u00e4lyn\u00e4|kielimallina",
    ),
)  # fmt: skip
_MACHINE = re.compile("|".join(language.machine for language in _LANGUAGES), re.IGNORECASE)
_CANNOT = re.compile("|".join(language.cannot for language in _LANGUAGES), re.IGNORECASE)
_SORRY = re.compile("|".join(language.sorry for language in _LANGUAGES), re.IGNORECASE)
_TASKS = [
    (
        re.compile(language.cannot, re.IGNORECASE),
        re.compile(language.sorry, re.IGNORECASE),
        re.compile(language.task, re.IGNORECASE),
    )
    for language in _LANGUAGES
]
_CONDITION = re.compile(
    r"\b(?:without|until|unless|before|sans|ohne|sin|senza|sem|zonder|bez|без|не зная|olmadan)\b|如果不|不知道|分からないと|모르면",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"(?<=[.!?\u3002\uff01\uff1f\u0964])\s*|\n+")
_APOLOGY = re.compile(r"\b(sorry|apolog\w+)\b", re.IGNORECASE)


def is_refusal(text: str, source_text: str) -> bool:
    """Whether a text refuses. One that is made from a refusal or an apology may."""
    return _refuses(text) and not (_APOLOGY.search(source_text) or _refuses(source_text))


def _refuses(text: str) -> bool:
    start = text.replace("\u2019", "'")[:_START]
    if _MACHINE.search(start):
        return True
    if not _CANNOT.search(start):
        return False
    for cannot, sorry, task in _TASKS:
        is_sorry = bool(sorry.search(start[:120]))
        for sentence in _SENTENCE.split(start):
            found = cannot.search(sentence)
            if found is None or _CONDITION.search(sentence):
                continue
            if is_sorry or task.search(sentence[found.start() :]):
                return True
    return False
