"""Controlled corruption: a good answer in free medical text, spoiled in one way along one criterion, or left alone.

The words are found by patterns, so an edit is made only where the context shows what a word means: `left lower lobe`
is a place, `left untreated` is not. What no pattern knows is not touched, and `spoil` then returns None.
"""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mede2.trainer.answering.answers import STRICT, TAG, parse_answer

FINDING = (
    r"(?:mass effect|free (?:air|fluid|gas)|mass(?:es)?|nodules?|lesions?|cavit(?:y|ies)|opacit(?:y|ies)|"
    r"opacifications?|consolidations?|infiltrates?|effusions?|pneumothora(?:x|ces)|h[ae]*mothorax|fractures?|"
    r"dislocations?|h[ae]*morrhages?|h[ae]*matomas?|infarct(?:s|ions?)?|o?edema|tumou?rs?|cysts?|abscess(?:es)?|"
    r"calcifications?|stenos[ie]s|aneurysms?|dissections?|thromb(?:us|i|osis)|embol(?:us|i|ism)|atelectasis|collapse|"
    r"cardiomegaly|hydronephrosis|hydrocephalus|stones?|calcul(?:us|i)|(?:lymph)?adenopathy|metastas[ie]s|ulcers?|"
    r"ulcerations?|erosions?|polyps?|hernias?|herniations?|obstructions?|perforations?|ascites|thickening|"
    r"enhancement|swelling|midline shift|osteophytes?|granulomas?|bullae?|emphysema|fibrosis|scarring|exudates?|"
    r"detachments?|drusen)"
)
UNCOUNTED = re.compile(  # nouns that take no "a": plurals, and what is not counted
    r"(?:mass effect|free \w+|o?edema|cavities|opacities|\w+ces|masses|abscesses|\w*(?<!s)(?<!u)(?<!i)s|stenoses|"
    r"metastases|\w+osis|\w+asis|thrombi|emboli|calculi|embolism|collapse|\w+megaly|hydrocephalus|\w*adenopathy|"
    r"ascites|thickening|enhancement|swelling|bullae|emphysema|scarring|drusen)",
    re.I,
)
PLACE = (
    r"(?:lungs?|lobes?|lobar|hil(?:um|a|ar)|hemi\w+|costophrenic|cardiophrenic|pleura\w*|bas(?:e|al|ilar)|ap(?:ex|ical)|"
    r"perihilar|paratracheal|retrocardiac|bronch\w+|main(?:stem)?|ventric\w+|atri(?:um|al)|heart|coronary|bundle|axis|"
    r"kidneys?|renal|ureter\w*|adrenal|ovar\w+|adnexa\w*|testic\w+|testis|scrot\w+|breasts?|eyes?|eyelids?|ocular|"
    r"retina\w*|optic|orbit\w*|ears?|cheek|fac(?:e|ial)|temporal|frontal|parietal|occipital|temporoparietal|"
    r"frontoparietal|cerebell\w+|cerebr\w+|thalam\w+|insula\w*|MCA|PCA|ACA|arter(?:y|ial)|veins?|carotid|vertebral|"
    r"femor\w+|femur|hips?|knees?|ankles?|f(?:oo|ee)t|toes?|legs?|thighs?|calf|arms?|forearms?|elbows?|wrists?|"
    r"hands?|fingers?|thumb|shoulders?|clavic\w+|humer\w+|radius|radial|ulnar?|tibia\w*|fibula\w*|patell\w+|scapul\w+|"
    r"ribs?|flank|quadrants?|groin|inguinal|iliac|thyroid|parotid|submandibular|tonsil\w*|neck|jaw|mandib\w+|"
    r"maxill\w+|sinus\w*|molars?|premolars?|canines?|incisors?|colon|colic|hepatic|zones?|fields?|limbs?|extremit\w+|"
    r"poles?|upper|lower|middle|mid|subclavian|jugular|axill\w+|chest|thora\w+|diaphragm\w*|pelvi\w+|sacroiliac|"
    r"acetabul\w+|metatars\w+|metacarp\w+|calcane\w+|gluteal|psoas|pneumothorax|effusions?|consolidations?|"
    r"nodules?|opacit\w+|catheters?|pigtail|stents?|infarct\w*|h[ae]*matomas?|h[ae]*morrhages?|stroke|fractures?|cavit\w+|hydronephrosis|"
    r"weakness|paresis)"
)
LEVEL_PLACE = (
    r"(?:(?:outer |inner )?quadrants?|lobes?|zones?|lung(?:s| zones?| fields?)?(?! volume| capacit)|poles?|segments?|"
    r"thirds?|half|extremit\w+|limbs?|(?:eye)?lids?|jaw|abdomen|legs?|arms?)"
)
NOT_BETWEEN = (  # words that cannot stand between a side and its organ: function words, and what is right or left else
    r"(?:a|an|the|this|that|these|those|of|in|on|at|to|for|from|with|without|by|as|and|or|but|nor|than|is|are|was|were|"
    r"be|been|has|have|had|do|does|did|it|its|his|her|their|my|your|our|him|them|us|not|no|if|when|while|because|so|"
    r"then|there|now|away|after|before|untreated|alone|behind|unchanged|over|out|off|until|since|during|about|into|"
    r"through|which|who|just|again|here|where|answers?|choices?|options?|diagnos[ie]s|treatment|decision|time|"
    r"conclusion|approach|track|shift|handed)"
)
CUE = re.compile(
    r"\b(?:images?|imaging|radiographs?|x-?rays?|films?|CT|MRI|scans?|ultraso\w+|sonogra\w+|echocardiogra\w+|"
    r"mammogra\w+|angiogra\w+|fundus|fundoscopy|photographs?|slide|figure|look|shows?|showing|reveals?|demonstrates?|"
    r"depicts?|visible|seen|visuali[sz]ed|observed?|identified)\b",
    re.I,
)
BREAK = re.compile(r"[;:]|\b(?:but|however|although|though|whereas|while|yet|except|apart)\b", re.I)  # ends a negation
NEGATION = re.compile(
    r"\b(?:no|not|without|absen(?:t|ce)|negative|free of|rul(?:e|es|ed|ing) out|exclud\w+|den(?:y|ies|ied)|never|nor|"
    r"neither|unlikely|against|resolved)\b",
    re.I,
)
CHECKS = r"(?:(?:double[- ]?|re-?)?check|verify|confirm|make sure|re-?(?:consider|examine|assess|evaluate|visit))"
REFLECTION = re.compile(
    r"^\W*(?:(?:but|however|and|so|now|hmm+|ok(?:ay)?|hold on|wait),?\s+)*(?:"
    r"wait(?=[,.!?:\u2026]|\s*[-\u2013\u2014]+\s|\s+(?:a|I|is|was|the|that|this|let|what)\b)|hold on\b|hmm+\b|"
    r"(?:on|upon) (?:a )?(?:second|closer|further|re-?)\s*(?:thought|look|inspection|review|reflection)\b|"
    r"looking (?:again|back|once more)\b|thinking again\b|"
    rf"re-?(?:check|examin|consider|assess|evaluat|visit)ing\b|double[- ]?checking\b|(?:re-?)?check:|to {CHECKS}\b)"
    rf"|\blet(?: me|['\u2019]s| us) (?:just |now )?(?:{CHECKS}\b|look again\b|think again\b|step back\b)"
    rf"|\bI (?:should|must|need to|want to|have to|will) (?:{CHECKS}\b|look again\b)"
    r"|\bon second thought",
    re.I,
)
CONCLUSIONS = (  # (pattern, what takes its place): the first that applies, in the last sentence in which any does
    (re.compile(r"\b(?P<is>is|are) (?:most )?(?P<so>consistent|compatible) with\b", re.I), r"\g<is> not \g<so> with"),
    (re.compile(r"(?<!not )(?<!un)\b(?:suggests|indicates|supports|favou?rs)\b", re.I), "argues against"),
    (re.compile(r"(?<!not )\b(?:suggest|indicate|support|favou?r)\b(?!\w)", re.I), "argue against"),
    (re.compile(r"\bpoints? (?:to|towards?)\b", re.I), "speaks against"),
    (re.compile(r"\bconfirms\b", re.I), "rules out"),
    (re.compile(r"(?<!not )(?<!the )\bmost likely\b", re.I), "least likely"),
    (re.compile(r"\b(?P<what>diagnosis|answer) is (?!not\b|un)", re.I), r"\g<what> is not "),
)  # fmt: skip
ABBREVIATIONS = {"e.g", "i.e", "dr", "mr", "mrs", "ms", "vs", "approx", "fig", "no", "cf", "st", "etc"}
SIDES = {"left": "right", "right": "left"}
LEVELS = {"upper": "lower", "lower": "upper"}
REACH = {
    "bilateral": "unilateral", "bilaterally": "unilaterally", "ipsilateral": "contralateral",
    "unilateral": "bilateral", "unilaterally": "bilaterally", "contralateral": "ipsilateral",
}  # fmt: skip
PEERS = {"right middle lobe": "lingula", "rml": "lingula", "lingula": "right middle lobe"}
INVENTIONS = {  # what the text is about -> findings that such an image could have shown
    r"chest|lungs?|thora\w+|pulmonary|pleura\w*|hil(?:um|ar)|(?:upper|middle|lower) (?:lobes?|zones?)": (
        "is a small {side} pleural effusion", "is a {side} apical pneumothorax", "is hilar lymphadenopathy",
    ),
    r"brain|cerebr\w+|\w*crani\w+|head|hemispher\w+|cort(?:ex|ical)|frontal|parietal|temporal|occipital": (
        "is a midline shift", "is a thin {side} subdural hematoma", "is a small hemorrhage in the {side} basal ganglia",
    ),
    r"abdom\w+|liver|hepatic|kidneys?|renal|bowel|colon|pancrea\w+|spleen|gallbladder|pelvi\w+": (
        "is free fluid in the pelvis", "is a calculus in the {side} kidney", "is a hypodense lesion in the liver",
    ),
    r"bones?|bony|fractures?|femur|femoral|tibia\w*|joints?|vertebra\w*|spine|knee|hip|shoulder|wrist|ankle": (
        "is a hairline fracture", "is a joint effusion", "is a lytic lesion",
    ),
    r"fundus|fundoscopy|retina\w*|macula\w*|optic": (
        "are flame-shaped hemorrhages", "is swelling of the optic disc", "are drusen in the macula",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Spoilt:
    """An answer after one edit: the whole text, and the passage of it before and after."""

    text: str
    before: str
    after: str


def spoil(text: str, edit: str, seed: int, options: Sequence[str] = ()) -> Spoilt | None:
    """The answer with one of `EDITS` made, or None where it offers nothing to spoil that way.

    Only the reasoning is edited, so a right answer stays right; `contradict_conclusion` changes the answer instead
    where the reasoning nowhere says its conclusion in words that can be turned round.

    Args:
        text: `<think>...</think> <answer>...</answer>`, or text without tags, which is all reasoning.
        edit: one of `EDITS`.
        seed: picks one where several edits are possible; the result is a function of the arguments alone.
        options: what the question offers.
    """
    match = STRICT.fullmatch(text) if parse_answer(text).well_formed else None
    if match is None and TAG.search(text):
        return None
    start, end = match.span("think") if match else (0, len(text))
    rng = random.Random(f"{seed} {edit} {text}")
    answer = match["answer"].strip() if match else ""
    done = EDITS[edit].make(text[start:end], rng, answer, options)
    if done is not None and done[0].strip():
        think, before, after = done
        return Spoilt(text[:start] + think + text[end:], before.strip(), after.strip())
    others = [option for option in options if option != answer]
    if edit == "contradict_conclusion" and match and answer in options and others:
        other, (start, end) = rng.choice(others), match.span("answer")
        return Spoilt(text[:start] + text[start:end].replace(answer, other) + text[end:], answer, other)
    return None


Made = tuple[str, str, str] | None  # the reasoning after the edit, the passage before, the passage after


def _swap_place(think: str, rng: random.Random, answer: str, options: Sequence[str]) -> Made:
    """Every side swapped, so that the reasoning stays of one piece; without sides its reach, else upper and lower."""
    for swap in (_swap_sides, _swap_reach, _swap_levels):
        swapped = swap(think)
        if swapped != think:
            pieces = zip(_sentences(think), _sentences(swapped), strict=True)
            before, after = next((before, after) for before, after in pieces if before != after)
            return swapped, before, after
    return None


def _drop_finding(think: str, rng: random.Random, answer: str, options: Sequence[str]) -> Made:
    """One sentence that tells what the image shows is missing."""
    sentences = _sentences(think)
    telling = [i for i, sentence in enumerate(sentences) if CUE.search(sentence) and _affirms(sentence)]
    if not telling:
        return None
    return _without(sentences, {rng.choice(telling)})


def _invent_finding(think: str, rng: random.Random, answer: str, options: Sequence[str]) -> Made:
    """Something said to be absent is there, or a sentence more tells of a finding nobody has spoken of."""
    sentences = _sentences(think)
    edits = [(i, after) for i, sentence in enumerate(sentences) if (after := _affirmed(sentence)) is not None]
    if (seen := next((i for i, sentence in enumerate(sentences) if CUE.search(sentence)), None)) is not None:
        side = rng.choice(("left", "right"))
        for invention in _inventions(think):
            sentence = sentences[seen]
            body = sentence.rstrip()
            space = sentence[len(body) :]
            edits.append((seen, f"{body} There {invention.format(side=side)}.{space}"))
    if not edits:
        return None
    i, after = rng.choice(edits)
    return "".join([*sentences[:i], after, *sentences[i + 1 :]]), sentences[i], after


def _contradict(think: str, rng: random.Random, answer: str, options: Sequence[str]) -> Made:
    """The last sentence that names the answer names another option; of an open question the last one that concludes
    says the contrary."""
    sentences = _sentences(think)
    for i in reversed(range(len(sentences))):
        before, after = sentences[i], None
        if answer in options and _names(before, answer):
            others = [option for option in options if option != answer and not _names(before, option)]
            if NEGATION.search(before) or not others:
                return None
            other = rng.choice(others)
            after = re.sub(_word(answer), lambda match, other=other: _like(match[0], other), before)
        elif not options and not NEGATION.search(before):
            made = (pattern.sub(other, before, count=1) for pattern, other in CONCLUSIONS)
            after = next((text for text in made if text != before), None)
        if after is not None:
            return "".join([*sentences[:i], after, *sentences[i + 1 :]]), before, after
    return None


def _delete_reflection(think: str, rng: random.Random, answer: str, options: Sequence[str]) -> Made:
    """No sentence looks back."""
    sentences = _sentences(think)
    reflecting = {i for i, sentence in enumerate(sentences) if REFLECTION.search(sentence)}
    return _without(sentences, reflecting) if reflecting else None


@dataclass(frozen=True)
class Edit:
    """One way to spoil an answer, and the criterion that it offends."""

    criterion: str
    make: Callable[[str, random.Random, str, Sequence[str]], Made]


EDITS = {
    "swap_laterality": Edit("no_hallucination", _swap_place),
    "drop_finding": Edit("image_analysis", _drop_finding),
    "invent_finding": Edit("no_hallucination", _invent_finding),
    "contradict_conclusion": Edit("logical_consistency", _contradict),
    "delete_reflection": Edit("reflection", _delete_reflection),
}


def _sentences(text: str) -> list[str]:
    """The text cut behind its sentences; joined it is the text again."""
    pieces, start = [], 0
    for match in re.finditer(r"[.!?]+[\"')\]]*\s+|\n+", text):
        words = text[start : match.start()].split()
        if not words or (len(words) == 1 and words[0].isdecimal()):
            continue  # nothing but the number of a list
        if words[-1].lower().lstrip("(") in ABBREVIATIONS:
            continue
        pieces.append(text[start : match.end()])
        start = match.end()
    return [*pieces, text[start:]] if text[start:] else pieces


def _without(sentences: list[str], left_out: set[int]) -> Made:
    kept = "".join(sentence for i, sentence in enumerate(sentences) if i not in left_out)
    if len(sentences) - 1 in left_out:
        kept = kept.rstrip()
    return kept, " ".join(sentences[i].strip() for i in sorted(left_out)), ""


def _like(model: str, word: str) -> str:
    """The word in the capitals of another."""
    if len(model) > 1 and model.isupper():
        return word.upper()
    return word[0].upper() + word[1:] if model[:1].isupper() else word


def _swap_sides(text: str) -> str:
    """Left and right where they are sides of a body, also in RLL or LUQ; the peer of the right middle lobe."""

    def swap(match: re.Match) -> str:
        word = match[0]
        if word.lower() in SIDES:
            return _like(word, SIDES[word.lower()]) if _is_side(text, match) else word
        if word.lower() in PEERS:
            return _like(word if word != "RML" else "", PEERS[word.lower()])
        return "LR"["RL".index(word[0])] + word[1:]  # of RLL, LUQ, R-sided

    peers = "|".join(PEERS)
    return re.sub(
        rf"\b(?:(?i:{peers})\b|[LR][UL][LQ]\b|[LR](?=-sided\b)|(?i:left|right)(?:\b|(?=wards?\b)))", swap, text
    )


def _is_side(text: str, match: re.Match) -> bool:
    """Whether this `left` or `right` is a side of a body, by what stands around it."""
    before, after = text[: match.start()], text[match.end() :]
    other = SIDES[match[0].lower()]
    if re.match(rf"(?:\s+(?:and|or|to)\s+(?:the\s+)?|\s*/\s*|-to-){other}\b", after, re.I):
        return False  # both sides alike: swapped, it would say the same
    if re.search(rf"\b{other}(?:\s+(?:and|or|to)\s+(?:the\s+)?|\s*/\s*|-to-)$", before, re.I):
        return False
    if re.match(r"wards?\b|[- ]sided?\b|\s+of\s+(?:the\s+)?midline\b", after, re.I):
        return True
    if re.match(r"\s+ones?\b", after, re.I) and re.search(
        rf"\b{other}\s+(?:[\w-]+\s+)?{PLACE}\b[^.!?]*$", before, re.I
    ):
        return True  # "the right kidney is small, the left one is not"
    if re.search(r"\b(?:he|she|they|we|who|surgeons?)\s+$", before, re.I):
        return False  # a verb
    if re.search(r"\b(?:on|in|to|towards?|from|than|at)\s+(?:the\s+|his\s+|her\s+)?$", before, re.I) and re.match(
        r"\s*(?:[.,;:)!?]|$)|\s+(?:is|are|was|were|and|than|with|shows?|there|but|where|which|in|of)\b", after
    ):
        return True
    return re.match(rf"(?:[\s-]+(?!{NOT_BETWEEN}\b)[\w-]+){{0,3}}?[\s-]+{PLACE}\b", after, re.I) is not None


def _swap_levels(text: str) -> str:
    apart = r"(?!\s*(?:and|or|to|/)\s*(?:upper|lower)\b)"
    organ = rf"(?<!\bupper and )(?<!\blower and )\b(?:upper|lower){apart}(?=\s+{LEVEL_PLACE}\b)"
    beside = rf"(?:(?<=\bleft )|(?<=\bright ))(?:upper|lower){apart}(?=\s*(?:[.,;:)]|$))"
    swapped = _exchange(rf"{organ}|{beside}", LEVELS, text)
    return re.sub(r"\b([LR])([UL])([LQ])\b", lambda match: match[1] + "LU"["UL".index(match[2])] + match[3], swapped)


def _swap_reach(text: str) -> str:
    return _exchange(rf"\b(?:{'|'.join(REACH)})\b", REACH, text)


def _exchange(pattern: str, table: Mapping[str, str], text: str) -> str:
    """Words by those of a table, with the article that they take."""

    def other(match: re.Match) -> str:
        word = _like(match["word"], table[match["word"].lower()])
        if match["article"] is None:
            return word
        vowel = word[0].lower() in "aeiou" and not word.lower().startswith("uni")
        return _like(match["article"], "an " if vowel else "a ") + word

    return re.sub(rf"(?P<article>\ban? )?(?P<word>{pattern})", other, text, flags=re.I)


def _affirms(sentence: str) -> bool:
    """Whether a finding is said to be there: one that no negation before or behind it covers."""
    return any(re.search(rf"\b{FINDING}\b", part, re.I) and not NEGATION.search(part) for part in BREAK.split(sentence))


def _affirmed(sentence: str) -> str | None:
    """The sentence with its first denied finding affirmed; None if it denies none in words that can be turned round."""
    match = re.search(
        r"\b(?P<no>no|without(?: any)?)\s+"
        r"(?P<evidence>(?:(?:definite|obvious|clear|visible|significant|apparent|convincing|radiographic)\s+)?"
        r"(?:evidence|signs?)\s+of\s+(?:an?\s+|any\s+)?)?"
        rf"(?P<noun>(?:(?!{NOT_BETWEEN}\b|longer\b|further\b|prior\b|previous\b|other\b|known\b)[\w-]+\s+){{0,3}}?"
        rf"(?P<head>{FINDING}))\b",
        sentence,
        re.I,
    )
    if match is None or re.search(r"\b(?:or|nor)\b", sentence[match.end() :], re.I):
        return None  # of "no effusion or mass", "an effusion or mass" would affirm neither
    noun = match["noun"]
    if re.match(r"an?\s", noun):
        there = noun
    elif match["evidence"]:
        there = match["evidence"].replace("any ", "") + noun
    elif UNCOUNTED.fullmatch(match["head"]):
        there = noun
    else:
        there = f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"
    if match["no"].lower().startswith("without"):
        there = f"with {there}"
    return sentence[: match.start()] + _like(match["no"].split()[0], there) + sentence[match.end() :]


def _inventions(think: str) -> list[str]:
    """Findings that fit the region that most words of the reasoning are about, none that it speaks of already."""
    hits = {region: len(re.findall(rf"\b(?:{region})\b", think, re.I)) for region in INVENTIONS}
    region = max(hits, key=hits.get)
    if not hits[region]:
        return []
    spoken = {word.lower() for word in re.findall(rf"\b{FINDING}\b", think, re.I)}
    return [
        invention for invention in INVENTIONS[region]
        if not {word.lower() for word in re.findall(rf"\b{FINDING}\b", invention, re.I)} & spoken
    ]  # fmt: skip


def _names(sentence: str, option: str) -> bool:
    return re.search(_word(option), sentence) is not None


def _word(option: str) -> str:
    return rf"(?i:(?<!\w){re.escape(option)}(?!\w))"
