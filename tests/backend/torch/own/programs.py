"""The solutions of the course's tracks as programs, and programs with a line of theirs changed."""

from collections.abc import Sequence

from llamita.learn import track
from llamita.learn.own_model import TRACKS, ReadersProgram


def solved(*changes: tuple[str, str, str], of: str = "min-llama", without: Sequence[str] = ()) -> ReadersProgram:
    """The solutions of a track, each of `changes` being a file and a text in it, which occurs once, with what stands
    there; modules that are `without` are not written."""
    uses, found = TRACKS[of], track.find(of)
    sources = dict(track.solutions_of(found.directory, uses.framework))
    for file, old, new in changes:
        path, text = sources[file]
        assert text.count(old) == 1, old
        sources[file] = (path, text.replace(old, new))
    names = tuple(name for name in (*uses.modules, *uses.further) if name not in without)
    return ReadersProgram(found.directory / uses.framework, of, names, sources)
