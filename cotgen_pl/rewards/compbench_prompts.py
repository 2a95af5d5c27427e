"""What T2I-CompBench's scores read out of a prompt: phrases, relations, counts, words.

Apart from compbench.py because this needs no network and decides which of them are needed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cotgen_pl.interfaces import Prompt
from cotgen_pl.phrases import PhraseFile
from cotgen_pl.rules.compbench import (
    RELATIONS_2D,
    RELATIONS_3D,
    THREE_IN_ONE,
    Relation,
    parse_complex_relation,
    parse_counts,
    parse_relation,
    read_nouns,
    select_phrases,
    template_phrases,
    without_adjectives,
)

# The terms of each category; a complex prompt has some of them, by `THREE_IN_ONE`.
TERMS: dict[str, tuple[str, ...]] = {
    "color": ("blip",),
    "shape": ("blip",),
    "texture": ("blip",),
    "spatial": ("spatial",),
    "non_spatial": ("clip",),
    "complex": ("blip", "spatial", "clip"),
    "numeracy": ("numeracy",),
    "3d_spatial": ("3d_spatial",),
}
CATEGORIES = tuple(TERMS)
BY_DETECTOR = frozenset(("spatial", "numeracy", "3d_spatial"))


@dataclass(frozen=True)
class Plan:
    """What is to be looked at in a picture of one prompt."""

    terms: tuple[str, ...] = ()
    """Their mean is the score."""
    phrases: Sequence[str] = ()
    """That BLIP is asked about."""
    relation: Relation | None = None
    """None in a complex prompt without two things: that term is 0."""
    counts: Sequence[tuple[str, int]] = ()
    text: str = ""
    """That CLIP reads."""
    failure: str = ""
    """Why there is no verdict; empty where there is one."""

    @property
    def nouns(self) -> list[str]:
        """What the detector looks for, each once."""
        related = [self.relation.first, self.relation.second] if self.relation else []
        return list(dict.fromkeys([*related, *(name for name, _ in self.counts)]))


@dataclass(frozen=True)
class PromptReader:
    """Makes plans of prompts.

    Args:
        reward: Name of the reward, for messages.
        categories: That prompts may be of.
        phrases: The fact that holds phrases.
        phrase_file: In its place, what spaCy said; without either, the template's two phrases.
        nouns: Singular by singular and plural, for counts.
    """

    reward: str
    categories: Sequence[str]
    phrases: str | None = None
    phrase_file: PhraseFile | None = None
    nouns: dict[str, str] = field(default_factory=dict)

    def part_name(self, category: str) -> str:
        """The name of a category's score; in brackets, what differs from the published metric."""
        variants = []
        if "blip" in TERMS[category] and self.phrase_variant:
            variants.append(self.phrase_variant)
        if BY_DETECTOR & set(TERMS[category]):
            variants.append("open_vocabulary")
        return category + (f"[{','.join(variants)}]" if variants else "")

    @property
    def phrase_variant(self) -> str:
        """Where phrases come from; empty for the published parser's."""
        if self.phrase_file is not None:
            published = self.phrase_file.is_published
            return "" if published else f"spacy-{self.phrase_file.parser['spacy']}"
        return self.phrases or "template"

    def check(self, prompt: Prompt) -> None:
        """Raise a ValueError for a prompt that is none of the benchmark's."""
        if prompt.category not in self.categories:
            raise ValueError(
                f"reward {self.reward}: expected prompts of the categories "
                f"{tuple(self.categories)}, got {prompt.category!r} for {prompt.text!r}; leave the "
                "others out of its data, or name their category under categories"
            )
        match prompt.category:
            case "spatial":
                self._check_relation(prompt, RELATIONS_2D)
            case "3d_spatial":
                self._check_relation(prompt, RELATIONS_3D)
            case "complex":
                self._check_part(prompt)
            case "color" | "shape" | "texture" if self.phrases is not None:
                self._check_phrases(prompt, self.phrases)

    def _check_relation(self, prompt: Prompt, relations: Sequence[str]) -> None:
        relation = parse_relation(prompt.text)
        if relation is None or relation.relation not in relations:
            raise ValueError(
                f"reward {self.reward}: expected 'a NOUN RELATION a NOUN' with a relation out of "
                f"{list(relations)}, got {prompt.text!r}; take T2I-CompBench's own file of the "
                f"category {prompt.category}"
            )

    def _check_part(self, prompt: Prompt) -> None:
        part = prompt.facts.get("part")
        if part not in THREE_IN_ONE:
            raise ValueError(
                f"reward {self.reward}: expected the fact 'part' out of {list(THREE_IN_ONE)} for a "
                f"complex prompt, got {part!r} for {prompt.text!r}; read the three files "
                "complex_val_<part>.txt in place of complex_val.txt"
            )

    def _check_phrases(self, prompt: Prompt, fact: str) -> None:
        match prompt.facts.get(fact):
            case [_, *_] as given if all(isinstance(p, str) and p.strip() for p in given):
                return
            case given:
                raise ValueError(
                    f"reward {self.reward}: expected a list of phrases, like ['a red cat'], under "
                    f"{fact!r}, got {given!r}; add them, or set phrases to the fact that holds "
                    "them"
                )

    def plan(self, prompt: Prompt) -> Plan:
        """What to look at in a picture of a prompt."""
        self.check(prompt)
        match prompt.category:
            case "non_spatial":
                return Plan(("clip",), text=prompt.text)
            case "spatial" | "3d_spatial":
                return Plan(TERMS[prompt.category], relation=parse_relation(prompt.text))
            case "numeracy":
                counts = parse_counts(prompt.text, self.nouns)
                failure = "" if counts else "none of the known nouns stands behind a number word"
                return Plan(("numeracy",), counts=counts, failure=failure)
            case "complex":
                return self._plan_complex(prompt)
            case _:
                return self._plan_phrases(prompt)

    def _plan_phrases(self, prompt: Prompt) -> Plan:
        if self.phrases is not None:
            return Plan(("blip",), phrases=select_phrases(prompt.facts[self.phrases]))
        if self.phrase_file is not None:
            parse = self.phrase_file.find(prompt.text)
            if parse is None:
                return Plan(failure="the phrase file does not hold this prompt")
            return Plan(("blip",), phrases=select_phrases(parse.phrases))
        phrases = template_phrases(prompt.text)
        if phrases is None:
            return Plan(failure="the template does not fit; a phrase file would tell the phrases")
        return Plan(("blip",), phrases=phrases)

    def _plan_complex(self, prompt: Prompt) -> Plan:
        if self.phrase_file is None:
            return Plan(failure="a complex prompt needs a phrase file, for its parts of speech")
        parse = self.phrase_file.find(prompt.text)
        if parse is None:
            return Plan(failure="the phrase file does not hold this prompt")
        terms = THREE_IN_ONE[prompt.facts["part"]]
        return Plan(
            terms,
            phrases=select_phrases(parse.phrases),
            relation=parse_complex_relation(parse.words) if "spatial" in terms else None,
            text=without_adjectives(parse.words),
        )


def read_noun_list(path: str) -> dict[str, str]:
    """The nouns of T2I-CompBench's new_objects.txt."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(
            f"expected T2I-CompBench's new_objects.txt at {file}, got no file; run `python "
            "tools/fetch.py t2i_compbench_prompts`, or set nouns to where it lies"
        )
    return read_nouns(file.read_text(encoding="utf-8").splitlines())


def terms_of(categories: Iterable[str]) -> set[str]:
    """All terms that prompts of some categories may have."""
    return {term for category in categories for term in TERMS[category]}


def check_categories(categories: Sequence[str] | None) -> tuple[str, ...]:
    """The categories named, each once, or all of them."""
    chosen = CATEGORIES if categories is None else tuple(dict.fromkeys(categories))
    if not chosen or not set(chosen) <= set(CATEGORIES):
        raise ValueError(
            f"expected categories out of {CATEGORIES}, got {list(chosen)}; name one or more, or "
            "leave them out for all"
        )
    return chosen


def check_phrase_source(phrases: str | None, phrase_file: str | None, terms: set[str]) -> None:
    """Raise a ValueError for two sources of phrases, or for one that no term needs."""
    if phrases is not None and phrase_file is not None:
        raise ValueError(
            f"expected phrases or phrase_file, got both, {phrases!r} and {phrase_file!r}; leave "
            "one of them out"
        )
    if (phrases or phrase_file) and "blip" not in terms:
        raise ValueError(
            f"expected no phrases without a category that asks about them, got "
            f"{phrases or phrase_file!r}; leave it out"
        )


def digest_files(*paths: str | None) -> str:
    """What the files that prompts are read by hold, in 16 hexadecimal digits for records."""
    digest = hashlib.blake2b(digest_size=8)
    for path in filter(None, paths):
        digest.update(Path(path).expanduser().read_bytes())
    return digest.hexdigest()
