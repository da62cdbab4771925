"""Makes docs/cli.md from the parsers of the command lines: ``python -m docs.generate.commands``."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator

import coordinator.cli
import edge_runtime.cli
import export.cli
from docs.generate.configuration import ROOT, PageError, anchor, table

PAGE = ROOT / "docs/cli.md"
#: How a help text ends that tells the default.
DEFAULT = re.compile(r"(?P<meaning>.*) \(default: (?P<default>.*)\)")
OPENING = """<!-- Made by `make reference`. Change the help texts of the commands, not this page. -->
# Commands

Every command explains itself with `--help`. Exit codes are in [errors.md](errors.md), the configuration files that
commands read in [configuration.md](configuration.md).
"""


def page() -> str:
    """The whole page."""
    programs = (edge_runtime.cli.build_parser(), export.cli.build_parser(), coordinator.cli.build_parser())
    return "\n".join([OPENING, *map(program_section, programs)])


def program_section(parser: argparse.ArgumentParser) -> str:
    """A program: a table of its commands, and a section for each."""
    commands = list(commands_of(parser))
    parts = [f"## {parser.prog}\n", f"{(parser.description or '').replace('``', '`')}\n"]
    rows = [(f"[`{command.prog}`](#{anchor(command.prog)})", about) for command, about in commands]
    parts.append(table(("command", "what it does"), rows))
    if own := option_table(parser):
        parts.append(own)
    for command, about in commands:
        usage = f"```\n{usage_of(command)}\n```\n"
        parts += [f"### {command.prog}\n", f"{about[0].upper()}{about[1:]}.\n", usage]
        if options := option_table(command):
            parts.append(options)
    return "\n".join(parts)


# argparse tells what a parser holds in attributes that start with an underscore alone; they are as old as it is.


def commands_of(parser: argparse.ArgumentParser) -> Iterator[tuple[argparse.ArgumentParser, str]]:
    """The commands that have none below them, each with its help text."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for choice in action._choices_actions:
                below = action.choices[choice.dest]
                inner = list(commands_of(below))
                yield from inner or [(below, choice.help or "")]


def arguments_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The arguments of a command: options in the order of its help, then what has no dashes."""
    own = [
        action
        for action in parser._actions
        if not isinstance(action, argparse._HelpAction | argparse._SubParsersAction)
    ]
    return sorted(own, key=lambda action: not action.option_strings)


def usage_of(parser: argparse.ArgumentParser) -> str:
    """The command line in short: options that must be there, ``[OPTIONS]`` for the others, and the rest."""
    arguments = arguments_of(parser)
    required = [invocation(each) for each in arguments if each.option_strings and each.required]
    others = any(each.option_strings and not each.required for each in arguments)
    rest = [value_of(each) for each in arguments if not each.option_strings]
    return " ".join([parser.prog, *required, *["[OPTIONS]"] * others, *rest])


def option_table(parser: argparse.ArgumentParser) -> str:
    """The arguments of a command; empty if it has none.

    Raises:
        PageError: an argument has no help, or its help keeps its default to itself.
    """
    rows = []
    for action in arguments_of(parser):
        where = f"{parser.prog} {invocation(action)}"
        if not action.help:
            raise PageError(f"{where} has no help; add help= where the command line makes it")
        text = action.help % {**vars(action), "prog": parser.prog}
        told = DEFAULT.fullmatch(text)
        if told is None and action.default not in (None, False, argparse.SUPPRESS):
            raise PageError(f'the help of {where} must end with "(default: %(default)s)"')
        default = told["default"] if told else "required" if action.required else ""
        if default == str(action.default):
            default = f"`{default}`"
        meaning = told["meaning"] if told else text
        if action.choices:
            meaning += "; one of " + ", ".join(f"`{choice}`" for choice in action.choices)
        rows.append((f"`{invocation(action)}`", default, meaning))
    return table(("option", "default", "meaning"), rows) if rows else ""


def invocation(action: argparse.Action) -> str:
    """An argument as it is written."""
    if not action.option_strings:
        return value_of(action)
    value = "" if action.nargs == 0 else f" {value_of(action)}"
    return ", ".join(action.option_strings) + value


def value_of(action: argparse.Action) -> str:
    """What stands for an argument's value; in brackets if it may be left out."""
    plain = action.dest.upper() if action.option_strings else action.dest
    name = action.metavar if isinstance(action.metavar, str) else plain
    return f"[{name}]" if action.nargs == "?" else name


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
