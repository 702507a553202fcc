"""`llamita chat`: talks with a model in the terminal.

Reads lines and commands, prints answers as they come. inference/conversation.py remembers what was said, text/chat.py
turns it into tokens.
"""

import contextlib
import dataclasses
import json
import re
import sys
import termios
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown

from llamita.backend.sampling_params import SamplingParams
from llamita.cli.generate import harmless
from llamita.cli.loading import LoadConfig, template_source
from llamita.inference.conversation import Conversation
from llamita.inference.llm import LLM
from llamita.inference.request import Statistics
from llamita.progress import ProgressBar
from llamita.storage import files
from llamita.text.chat import Chat

HELP = """\
/reset          forget what was said
/system TEXT    set the system message (nothing: remove it) and forget what was said
/params         show the sampling parameters; /params temperature 0.5 sets one
/save FILE      write the conversation as JSON
/help           this list
/quit           leave, as does Ctrl-D
A line that ends in \\ goes on in the next; a text of many lines goes between \"\"\" and \"\"\".
Ctrl-C stops an answer."""
REFRESHES = 8  # a second, of the part of an answer that is not complete


@dataclass(frozen=True)
class ChatConfig:
    """Talk with a trained model in the terminal; /help lists the commands there."""

    model: tyro.conf.Positional[Path]
    """A model directory, a training run (then its best checkpoint), a GGUF file, or a name on the hub (owner/name)."""
    template: str | None = None
    """The chat template, instead of the model's own or where it has none: chatml, r0, plain, plain-eos, or a file of
    Jinja."""
    system: str = ""
    """A system message, which the model reads first."""
    sampling: SamplingParams = SamplingParams(max_tokens=512)
    running: LoadConfig = LoadConfig()


def run(config: ChatConfig) -> int:

    if config.sampling.n > 1:
        raise ValueError(f"n={config.sampling.n} gives several answers at once, and a chat has one; leave n at 1")
    options = config.running.arguments()
    with ProgressBar(f"opening {config.model.name}"):  # kernels are compiled the first time
        llm = LLM.load(config.model, **options)
    if llm.tokenizer is None:
        raise ValueError(f"{config.model} has no tokenizer beside it, and a chat needs one")
    try:
        chat = Chat(llm.tokenizer, template_source(config.template))
    except ValueError as error:
        raise ValueError(f"{error} with --template") if config.template is None else error from None
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a character shows a question mark
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    conversation = Conversation(chat, llm.config.max_position_embeddings, config.system)
    with contextlib.suppress(EOFError):
        Talk(llm, conversation, config.sampling, Console(highlight=False)).loop()
    llm.close()
    return 0


class Talk:
    """A session at the terminal: reads what the user says and prints the answers."""

    def __init__(self, llm: LLM, conversation: Conversation, params: SamplingParams, console: Console) -> None:
        self._llm, self._conversation, self._params, self._console = llm, conversation, params, console
        self._saved: set[Path] = set()
        self._interactive = sys.stdin.isatty()
        if self._interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - gives input() its editing and its history

    def loop(self) -> None:
        """Reads and answers until the end of the input, which raises EOFError."""
        if self._interactive:
            self._note("/help lists the commands, Ctrl-D leaves")
        while True:
            try:
                said = read_message(self._line)
                if said.startswith("/"):
                    self._command(said)
                elif said.strip():
                    self._answer(said)
            except KeyboardInterrupt:
                print()
                self._note("Ctrl-D or /quit leaves")
            except EOFError:
                if self._interactive:
                    print()
                raise
            except (ValueError, OSError) as error:
                self._note(f"error: {error}")

    def _line(self, prompt: str) -> str:
        return input(prompt if self._interactive else "")

    def _note(self, text: str) -> None:
        self._console.print(harmless(text), style="dim", markup=False)

    def _answer(self, said: str) -> None:
        params = self._conversation.params(self._params)
        tokens, forgotten = self._conversation.ask(said, params.max_tokens)
        if forgotten:
            self._note(f"the context is full: the {forgotten} oldest messages were forgotten")
        reply = Reply(self._llm, tokens, params)
        try:
            with contextlib.closing(reply.pieces), silent_keys():
                self._show(reply)
        except KeyboardInterrupt:  # what came so far is kept
            pass
        except RuntimeError as error:
            self._note(f"error: {error}")
        self._conversation.answer(reply.text)
        if reply.statistics is not None:
            self._note(reply.summary())

    def _show(self, reply: "Reply") -> None:
        """Prints an answer as it comes: as Markdown on a terminal, elsewhere as it is."""
        if not self._console.is_terminal:
            try:
                for piece in reply.pieces:
                    print(piece, end="", flush=True)
            finally:
                print(flush=True)
            return
        text, shown = "", 0  # of the text: whole blocks, printed for good; the rest is drawn again and again
        try:
            with Live(console=self._console, transient=True, refresh_per_second=REFRESHES) as live:
                for piece in reply.pieces:
                    text += harmless(piece)
                    end = end_of_blocks(text, shown)
                    if end > shown:
                        live.update("")
                        live.console.print(Markdown(text[shown:end]))
                        shown = end
                    live.update(Markdown(text[shown:]))
        finally:
            if text[shown:].strip():
                self._console.print(Markdown(text[shown:]))

    def _command(self, said: str) -> None:
        name, _, rest = said.partition(" ")
        rest = rest.strip()
        if name == "/quit":
            raise EOFError
        if name == "/help":
            self._console.print(HELP, markup=False)
        elif name == "/reset":
            self._conversation.reset()
            self._note("forgotten")
        elif name == "/system":
            self._conversation.system = rest
            self._conversation.reset()
            self._note("the system message is set" if rest else "there is no system message")
        elif name == "/save":
            self._save(rest)
        elif name == "/params":
            if rest:
                self._params = changed(self._params, rest)
            self._note(described(self._params))
        else:
            raise ValueError(f"there is no command {name}; /help lists them")

    def _save(self, name: str) -> None:
        if not name:
            raise ValueError("/save needs the name of a file")
        path = Path(name).expanduser().resolve()
        if path.exists() and path not in self._saved:
            raise FileExistsError(f"{path} exists already; choose another name")
        content = {"messages": self._conversation.messages}
        files.atomic_write(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        self._saved.add(path)
        self._note(f"saved {len(self._conversation.messages)} messages to {path}")


class Reply:
    """An answer under way: `pieces` yields its text; `text` and `statistics` cover the pieces read so far."""

    def __init__(self, llm: LLM, tokens: tuple[int, ...], params: SamplingParams) -> None:
        self.text = ""
        self.statistics: Statistics | None = None
        self._ending = "stopped"
        self.pieces = self._read(llm, tokens, params)

    def _read(self, llm: LLM, tokens: tuple[int, ...], params: SamplingParams) -> Generator[str]:
        for event in llm.events(tokens, params, background=True):
            self.statistics = event.statistics
            if event.finish_reason == "error":
                raise RuntimeError(event.error)
            self._ending = event.finish_reason or self._ending
            self.text += event.text
            yield event.text

    def summary(self) -> str:
        """Returns the answer's length and speed in words, and why it was cut off or stopped where it was."""
        assert self.statistics is not None
        count = self.statistics.generated_tokens
        speed = self.statistics.decode_tokens_per_second
        parts = [f"{count} token{'s' * (count != 1)}", f"{speed:.1f} tokens/s" if speed else ""]
        parts.append(
            {"stop": "", "length": "cut off: max_tokens or the context is used up"}.get(self._ending, "stopped")
        )
        return ", ".join(filter(None, parts))


@contextlib.contextmanager
def silent_keys() -> Iterator[None]:
    """Hides keys typed while an answer is drawn: their echo, ^C too, would move what is drawn."""
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    silent = [*before]
    silent[3] = before[3] & ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def read_message(line: Callable[[str], str]) -> str:
    """Returns one message of one line or several; `line(prompt)` gives the next line."""
    text = line("> ")
    if text.startswith('"""'):
        text = text[3:]
        while '"""' not in text:
            text += "\n" + line(". ")
        return text[: text.index('"""')].strip("\n")
    while text.endswith("\\"):
        text = text[:-1] + "\n" + line(". ")
    return text


def end_of_blocks(text: str, start: int) -> int:
    """Returns the end of the last complete block of Markdown after `start`: a blank line outside of fenced code."""
    end, fenced, position = start, False, start
    for line in text[start:].splitlines(keepends=True):
        position += len(line)
        if re.match(r"\s*(```|~~~)", line):
            fenced = not fenced
        elif not fenced and not line.strip() and line.endswith("\n"):
            end = position
    return end


def changed(params: SamplingParams, assignment: str) -> SamplingParams:
    """Returns the parameters with one of them set, as `/params NAME VALUE` says."""
    name, _, given = assignment.replace("=", " ", 1).partition(" ")
    names = [field.name for field in dataclasses.fields(SamplingParams) if field.name != "n"]
    if name not in names:
        raise ValueError(f"there is no parameter {name!r}; there are {', '.join(names)}")
    try:
        value = json.loads(given)
    except ValueError:
        value = given.strip()
    if value is None or value == "":
        return dataclasses.replace(params, **{name: getattr(SamplingParams(), name)})
    if isinstance(getattr(params, name), str):
        value = given.strip()
    return SamplingParams.from_json({name: value}, params)


def described(params: SamplingParams) -> str:
    """Returns the best-known parameters and those that differ from plain sampling, one a line."""
    plain = SamplingParams()
    usual = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_tokens", "seed")
    values = {field.name: getattr(params, field.name) for field in dataclasses.fields(params)}
    return "\n".join(
        f"{name} {value}" for name, value in values.items() if name in usual or value != getattr(plain, name)
    )
