"""What the demo prints."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from lab.stage import DemoError, Interrupts, Programmed

WIDTH = 100
MOST_COMMANDS = 8


class Screen:
    """Titles, sentences and commands on a console, with a pause before each scene."""

    def __init__(self, console: Console, interrupts: Interrupts, breath: float) -> None:
        self.console = console
        self._interrupts = interrupts
        self._breath = breath if console.is_terminal else 0
        self._scenes = 0

    def title(self, text: str) -> None:
        """A heading, after a pause."""
        self._interrupts.pause(self._breath)
        self.console.print(Text(f"\n{text}\n{'-' * len(text)}", style="bold green"))

    def step(self, text: str) -> None:
        """The heading of the next scene, numbered."""
        self._scenes += 1
        self.title(f"{self._scenes}. {text}")

    def say(self, text: str, style: str = "") -> None:
        """A paragraph."""
        self.console.print(Text(text, style=style))

    def command(self, text: str) -> None:
        """A command, indented."""
        self.say(f"    {text}", style="cyan")

    def indent(self, text: str) -> None:
        """The output of a command, indented."""
        for line in text.rstrip().splitlines():
            self.say(f"    {line}".rstrip())

    def show(self, done: Programmed) -> None:
        """What changed in the kernel, and how long that took."""
        shown = [command for command in done.commands if " ip sliceproxy " in command]
        if not shown:
            raise DemoError("the agent logged a transaction, but no change of table ip sliceproxy")
        for command in shown[:MOST_COMMANDS]:
            self.say(f"  {command}", style="cyan")
        more, others = len(shown) - MOST_COMMANDS, len(done.commands) - len(shown)
        rest = [f"{more} more"] if more > 0 else []
        rest += [f"{others} for table ip6, which say the same"] if others else []
        if rest:
            self.say(f"  and {', and '.join(rest)}")
        self.say(cost(done))


def console(plain: bool) -> Console:
    """A console as wide as the terminal, WIDTH at most."""
    # Neither markup nor emoji: an IPv6 address has the colons and brackets of both.
    console = Console(
        markup=False, emoji=False, highlight=False, force_terminal=False if plain else None
    )
    console.width = min(WIDTH, console.width) if console.is_terminal else WIDTH
    return console


def cost(done: Programmed) -> str:
    """How large a transaction was, and how long it took."""
    return (
        f"{done.elements} elements in one transaction: kernel {done.kernel_ms:.2f} ms, "
        f"agent {done.ms:.2f} ms, from file to done {done.end_to_end_ms:.1f} ms"
    )
