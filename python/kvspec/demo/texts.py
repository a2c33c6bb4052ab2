"""What the conversations are about: two system prompts, two documents, and questions."""

from typing import NamedTuple

__all__ = ["SCRIPTS", "Script"]


class Script(NamedTuple):
    """One side of a conversation. Answers come from the model."""

    name: str
    system: str
    document: str
    questions: tuple[str, ...]

    @property
    def opening(self) -> str:
        """What the user says first: the document, and the first question about it."""
        return f"{self.document}\n\n{self.questions[0]}"


_GUIDE = """\
You are the guide of a small museum of instruments. Visitors read a sheet of paper from the \
collection and ask you about it. Answer in one or two plain sentences, and only from what the \
sheet says. If the sheet does not say it, say so and offer the nearest thing that it does say. \
Never invent a date, a name or a number. Be kind to children and patient with everybody else."""

_EDITOR = """\
You are an editor who prepares texts for a weekly paper. A reader sends a text and asks for help \
with it. Write short sentences and common words. Keep every number as it stands in the text, keep \
the order of events, and do not add an opinion of your own. When you are asked for a list, give \
one item for each line. When you are asked for a title, give one title and nothing else."""

_LIGHTHOUSE = """\
The lighthouse at Skerrow Point was lit for the first time on a stormy evening in October 1871. \
Its tower is thirty-one metres high and stands on a reef that is dry for two hours at low tide. \
The first lamp burned rape oil in four wicks and was turned by a weight on a chain, which the \
keeper had to wind up every forty minutes. In 1908 the oil gave way to a mantle of glowing gas, \
and in 1953 to an electric bulb of one thousand watts. Three keepers and their families lived in \
the low house beside the tower. They grew potatoes in soil that had been brought over in barrels, \
kept two goats, and collected rain from the roof, because the well was salt. The log book of the \
station has no empty day in eighty-two years. Its longest entry is of the night of 3 January 1925, \
when the ship Alma ran on the reef and all nineteen people on board were brought ashore by a rope. \
The last keeper left in 1985. Since then the light has been switched on by a clock, and the house \
is rented to people who study birds."""

_BRIDGE = """\
The town of Orley has two halves and one river, and for six hundred years it had no bridge. People \
crossed on a ferry that was pulled along a rope by a horse on the bank. In dry summers they walked \
through the ford; in spring, when the snow melted, nobody crossed at all, and the two halves kept \
different clocks. In 1844 a carpenter named Ida Morrow built a bridge of oak on seven piers of \
stone. It was nine metres wide, so that two carts could pass, and it had a roof, because a roof \
costs less than a new floor every ten years. The toll was one penny for a person, two for a horse \
and nothing for a doctor. The flood of 1893 carried away two piers and the roof between them, and \
the town mended both in eleven weeks. Trucks were forbidden in 1931. Today the bridge carries \
walkers, bicycles and a market on the first Sunday of every month, when forty stalls stand under \
the roof in two rows. The clocks on both sides show the same time, except on that Sunday."""

SCRIPTS: tuple[Script, ...] = (
    Script(
        *("Ada", _GUIDE, _LIGHTHOUSE),
        ("How high is the tower?", "What did the first lamp burn?", "Who lives there today?"),
    ),
    Script(
        *("Ben", _GUIDE, _LIGHTHOUSE),
        ("What happened to the ship Alma?", "How many people were saved?"),
    ),
    Script(
        *("Cleo", _GUIDE, _BRIDGE),
        ("Who built the bridge?", "Why does it have a roof?", "What was the toll for a doctor?"),
    ),
    Script(
        *("Dan", _EDITOR, _LIGHTHOUSE),
        ("Give me a title for this text.", "Now write its first sentence in simpler words."),
    ),
    Script(
        *("Eve", _EDITOR, _BRIDGE),
        ("List the years in this text.", "What happened in the second of them?"),
    ),
    Script(
        *("Finn", _GUIDE, _LIGHTHOUSE),
        ("What did the families eat?", "Why did they collect rain?", "When did they leave?"),
    ),
    Script(
        *("Gwen", _EDITOR, _BRIDGE),
        ("Give me a title for this text.", "Shorter, please.", "And one for children?", "Thanks!"),
    ),
    Script(
        *("Hugo", _GUIDE, _BRIDGE),
        ("When is the market?", "How many stalls are there?", "Are trucks allowed?"),
    ),
)
"""Sorted by nothing: those who share a beginning do not come one after the other."""
