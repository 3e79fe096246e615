"""Masks secrets among the arguments of a program, and in command lines inside one argument."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gpumon_core.attribution.secrets import programs, texts, tokens
from gpumon_core.attribution.secrets.programs import SecretKind, SecretOptions
from gpumon_core.attribution.secrets.texts import STARS, is_starred
from gpumon_core.attribution.secrets.tokens import Token
from gpumon_core.attribution.secrets.values import HEX40, SPLIT_OPTIONS, SPLITS
from gpumon_core.attribution.secrets.words import (
    HEADS,
    is_path,
    is_secret,
    is_value_harmless,
    kind_of,
    word_set,
    words_of,
)

# Command lines inside command lines: `ssh host "sh -c '...'"`.
DEEPEST = 5
# A longer argument is searched as a text only, not for commands.
LONGEST_LINE = 65_536
OPTION = re.compile(r"--?[A-Za-z][\w.:-]*(?:=.*)?|--", re.DOTALL)
OPTION_NAME = re.compile(r"--?[A-Za-z_+][\w.:/@\[\]-]*")
SPELLED = re.compile(r"-[A-Za-z][A-Za-z_-]*[A-Za-z]")
ASSIGNMENT = re.compile(r"(?P<name>[A-Za-z_][\w.\[\]-]{0,127})(?P<separator>:=|=)(?P<value>.*)", re.DOTALL)
WINDOWS = re.compile(r"(?P<name>/[A-Za-z][\w-]{0,63}):(?P<value>.+)", re.DOTALL)
# The next argument of these is a command, or a line of variables.
CODE = word_set("-c -lc -ic -lic -ec -xc -cl -Command -command /c /C /k --eval --extra-vars --command")
# These take a command as one argument.
TAKES_LINES = word_set("ssh tmux screen watch mosh at script sg wsl xterm byobu")
# For these -e sets a variable.
ENGINES = word_set("docker podman nerdctl docker.exe kubectl oc lxc")
# The separator before the next part of a value with several parts.
NEXT_PART = re.compile(r"[,;&](?=[\w.\[\]-]{1,64}=)")
VERBS = word_set("set add get create delete remove unset config configure list show")
NAME = re.compile(r"(?://[\w.:/@-]{2,256}|[\w.:@-]{2,256})")
WRITERS = [[word] for word in programs.WRITES_SECRET]
SAID = re.compile(r"(?P<scheme>(?:Bearer|Token|Basic|ApiKey|Bot)\s+)\S+", re.IGNORECASE)
# Text in quotes in the middle of a word.
SEGMENT = re.compile(r"([\"'])((?:\\[\s\S]|(?!\1)[^\\])*+)\1")
AUTH_WORDS = word_set("auth authorization authentication header headers bearer")
TEXT_OF_A_COMMAND = re.compile(r"\s")


@dataclass(slots=True)
class _Pending:
    """A value that the next argument must be. It is `sure` where the table of the program says so, whatever the
    argument looks like; `words` is the kind of its name."""

    kind: SecretKind
    words: str = "password"
    sure: bool = False
    is_word: bool = False
    takes_more: bool = False
    has_begun: bool = False


class _Walker:
    """Goes through one command line, from its program to its last argument."""

    def __init__(self, text: Callable[[str, int], str], depth: int) -> None:
        self._text = text
        self._depth = depth
        self._way: SecretOptions | None = None
        self._program = ""
        self._launches = True
        self._is_first = True
        self._pending: _Pending | None = None
        self._positionals: list[str] = []
        self._letters = ""
        self._previous = self._before = ""
        self._is_about_secrets = self._has_user = False

    def step(self, argument: str) -> str:
        """The argument with its secrets starred."""
        masked = self._step(argument)
        if self._previous in programs.USER_OPTIONS and self._may_have_user(argument):
            self._has_user = True
        if masked == argument and self._previous.startswith("-") and (said := SAID.fullmatch(argument)):
            # --auth-header "Bearer x"
            is_one = AUTH_WORDS.intersection(words_of(self._previous)) and not is_starred(argument)
            masked = said["scheme"] + STARS if is_one else masked
        if argument in programs.ABOUT_SECRETS or (NAME.fullmatch(argument) and is_secret(argument)):
            self._is_about_secrets = True
        self._before, self._previous = self._previous, argument
        return masked

    def _step(self, argument: str) -> str:
        pending = self._pending
        if pending is not None and argument:
            if self._is_value(pending, argument):
                if not pending.takes_more:
                    self._pending = None
                has_begun, pending.has_begun = pending.has_begun, True
                masked = self._value(pending.kind, argument, pending.words, has_begun)
                if masked is not None:
                    return masked
                self._pending = None
            else:
                self._pending = None
        if len(argument) > 1 and argument[0] == "-":
            return self._option(argument)
        if len(argument) > 2 and argument[0] == "/" and (windows := WINDOWS.fullmatch(argument)):
            masked = self._windows(windows)
            if masked is not None:
                return masked
        if argument[:1] == "/" and self._way is not None and argument in self._way.long:
            self._pending = _Pending(self._way.long[argument], sure=True)
            return argument
        return self._positional(argument)

    def _may_have_user(self, argument: str) -> bool:
        """Whether the value of -u is a user, for a program that may take a password with -p."""
        if self._way is not None or argument.startswith("-") or argument.isdigit():
            return False
        # python -u takes no user, and sudo -u takes a user without a password; a script can have any options.
        return not programs.is_launcher(self._program) or (
            programs.PYTHON.fullmatch(self._program) is not None and len(self._positionals) > 1
        )

    # -- values of options ----------------------------------------------------------------------------------

    def _is_value(self, pending: _Pending, argument: str) -> bool:
        if not argument.startswith("-") or argument == "-":
            return True
        if pending.has_begun:
            return False
        if pending.sure:
            return True
        if argument.startswith("--"):
            return OPTION.fullmatch(argument) is None
        if len(argument) == 2:
            return False
        # After --password, -abc is the value; after -password it is another option.
        return not (pending.is_word and OPTION.fullmatch(argument))

    def _value(self, kind: SecretKind, value: str, words: str = "password", is_more: bool = False) -> str | None:  # noqa: PLR0911 - a kind a branch
        """A value of that kind, starred; None where it is to be treated as any other argument."""
        if is_starred(value):
            return value
        if kind in ("secret", "attached"):
            if is_value_harmless(words, value) or (words != "password" and value in texts.PROSE):
                return None if is_more else self._looked_through(value)
            if is_more and not (re.fullmatch(r"[\w.~+=-]{6,}", value) and re.search(r"\d", value)):
                return None
            return self._starred(value, words)
        if kind == "letter":
            # It can also be a port, a process, a partition or a folder.
            is_other = re.fullmatch(r"[\d:.,/-]+(?:tcp|udp)?|.", value) or is_path(value)
            return self._looked_through(value) if is_other or is_value_harmless("password", value) else STARS
        if kind == "many":
            return STARS
        if kind == "command":
            # echo s3cret
            writer = value.split(maxsplit=1)[:1]
            return f"{writer[0]} {STARS}" if writer in WRITERS else self._looked_through(value)
        if kind in SPLITS:
            return SPLITS[kind](value)
        if kind == "header":
            return texts.header(value)
        if kind == "literal":
            name, separator, _ = value.partition("=")
            return f"{name}={STARS}" if separator else value
        return self._looked_through(value)

    def _starred(self, value: str, words: str) -> str:
        scheme = texts.SCHEME.match(value)
        if scheme is not None and scheme.end() < len(value):
            return value[: scheme.end()] + STARS
        if words in ("auth", "credential", "weak", "cookie"):
            if words == "cookie":
                return SPLITS["cookie"](value)
            user, separator, _ = value.partition(":")
            if separator and re.fullmatch(r"[\w.@+-]{1,64}", user):
                return f"{user}:{STARS}"
        if "://" in value:
            shown = self._looked_through(value)
            if shown != value:
                return shown
        # --secret id=npm,src=/run/npm: parts with names of their own.
        if re.match(r"[A-Za-z_]\w{0,31}=", value) and words in ("secret", "credential"):
            return self._looked_through(value)
        return STARS

    def _looked_through(self, value: str) -> str:
        return self._text(value, self._depth)

    # -- options --------------------------------------------------------------------------------------------

    def _option(self, argument: str) -> str:  # noqa: PLR0911, PLR0912 - a way to write it a branch
        name, separator, value = argument.partition("=")
        way = self._way
        is_ours = way is not None and (not way.verbs or bool(way.verbs.intersection(self._positionals)))
        if way is not None and name in way.long:
            kind = way.long[name]
            if separator:
                masked = self._value("secret" if kind == "attached" else kind, value) if value else value
                return f"{name}={value if masked is None else masked}"
            self._pending = (
                None if kind in ("flag", "attached") else _Pending(kind, sure=True, takes_more=kind == "many")
            )
            return argument
        if way is not None and argument[1] != "-":
            for option, kind in way.long.items():
                # 7z's -psecret, -hpsecret
                if kind == "attached" and argument.startswith(option) and len(option) < 4:
                    return option + STARS
            letter = way.letters.get(argument[1])
            # -password, of a program that has -p too; but mysql's -psecret.
            is_name = letter != "attached" and SPELLED.fullmatch(name) and words_of(name)[-1] in HEADS
            if is_ours and not is_name and (masked := self._cluster(way, argument)) is not None:
                return masked
        if not OPTION_NAME.fullmatch(name):
            return self._looked_through(argument)
        words = kind_of(name)
        if words in ("", "weak") and argument[1] != "-" and separator:
            # -Dpassword=x, -PapiKey=x, -eTOKEN=x
            words = kind_of(name[2:]) or words
        is_word = argument[1] != "-"
        if words:
            if not separator:
                self._expect(name, words, is_word)
                return self._looked_through(argument)
            if value and not is_value_harmless(words, value):
                return f"{name}={self._assigned(value, words)}"
        elif (value and name in programs.VALUES and self._is_about_secrets) or (
            separator and "wandb" in name.lower() and HEX40.fullmatch(value)
        ):
            return f"{name}={STARS}"
        if separator and value:
            return f"{name}={self._text_of_value(value)}"
        if "wandb" in name.lower():
            self._pending = _Pending("wandb")
        elif name in programs.PASSWORD_LETTERS and self._has_user:
            self._pending = _Pending("letter")
        elif name in programs.VALUES and self._is_about_secrets:
            self._pending = _Pending("secret")
        elif name.endswith(("-command", "-cmd", "_command", "_cmd")) and kind_of(re.split("[-_]c", name)[0]):
            self._pending = _Pending("command")
        elif name in SPLIT_OPTIONS:
            self._pending = _Pending(SPLIT_OPTIONS[name])
        elif is_word and (attached := re.match(r"-[A-Za-z](?=[A-Z_]{2,64}[\w]{0,64}=)", argument)):
            return attached[0] + self._text_of_value(argument[attached.end() :])
        return self._looked_through(argument)

    def _text_of_value(self, value: str) -> str:
        """The value of an option that is not for secrets: NAME=value, or any text."""
        return self._assignment(value) or self._looked_through(value)

    def _expect(self, name: str, words: str, is_word: bool) -> None:
        if words in ("weak", "signature", "cookie", "auth", "pat", "pin"):
            self._pending = _Pending("secret", words, is_word=is_word)
            return
        takes_more = words == "key" or words_of(name)[-1].endswith("s")
        self._pending = _Pending("secret", words, is_word=is_word, takes_more=takes_more)

    def _assigned(self, value: str, words: str) -> str:
        """The value of NAME=value, starred up to where the next part has a name of its own."""
        part = NEXT_PART.search(value)
        if part is not None and part.start() > 0:
            return self._starred(value[: part.start()], words) + self._looked_through(value[part.start() :])
        return self._starred(value, words)

    def _cluster(self, way: SecretOptions, argument: str) -> str | None:
        """Several letters after one dash; the last one may take a value: -su ada:s3cret."""
        for place, letter in enumerate(argument[1:], 1):
            kind = way.letters.get(letter)
            rest = argument[place + 1 :]
            if kind is None:
                if letter in way.takes:
                    if rest:
                        return argument[: place + 1] + self._text_of_value(rest)
                    self._pending = _Pending("data")
                    return argument
                if not letter.isalpha():
                    return None
                self._letters += letter
                continue
            if kind == "flag":
                continue
            if rest:
                equals = "=" if rest.startswith("=") and kind != "cookie" else ""
                masked = self._value("secret" if kind == "attached" else kind, rest.removeprefix(equals))
                return argument[: place + 1] + equals + (rest.removeprefix(equals) if masked is None else masked)
            if kind != "attached":
                self._pending = _Pending(kind, sure=True)
            return argument
        return None

    def _windows(self, found: re.Match[str]) -> str | None:
        name, value = found["name"], found["value"]
        words = kind_of(name)
        if self._way is not None and name in self._way.long:
            return f"{name}:{STARS}"
        if name.lower() in ("/p", "/rp", "/pw") and not re.match(r"\w+=", value) and not value.isdigit():
            words = "password"
        if words and not is_value_harmless(words, value) and not is_starred(value):
            return f"{name}:{STARS}"
        return None

    # -- other arguments --------------------------------------------------------------------------------------

    def _positional(self, argument: str) -> str:
        if is_starred(argument) and len(argument) == len(STARS):
            self._positionals.append(argument)
            return argument
        is_code = (
            self._previous in CODE
            or (self._previous == "-e" and self._program not in ENGINES)
            or self._previous in ("-S", "--split-string")
            or (self._program in TAKES_LINES and bool(re.match(r"\w+=\S*\s+\S", argument)))
            or (self._is_first and TEXT_OF_A_COMMAND.search(argument) is not None)
        )
        if not is_code and (assigned := self._assignment(argument)) is not None:
            if not (self._is_first or self._launches):
                self._positionals.append(argument)
            masked = self._behind_words(argument)
            return assigned if masked is None else masked
        if self._launches and self._starts_program(argument):
            return self._looked_through(argument)
        masked = self._behind_words(argument)
        self._positionals.append(argument if len(argument) < 256 else "")
        return self._looked_through(argument) if masked is None else masked

    def _starts_program(self, argument: str) -> bool:
        """Take an argument as the program that the next arguments belong to, if it is one."""
        if (
            not self._is_first
            and self._previous in programs.LAUNCHERS_TAKE
            and self._previous not in programs.LAUNCHERS_FLAGS.get(self._program, ())
        ):
            return False
        if TEXT_OF_A_COMMAND.search(argument):
            if self._is_first:
                self._is_first = self._launches = False
            return False
        name, way = programs.way_of(argument)
        launches = programs.is_launcher(name)
        if way is None and not launches and not self._is_first:
            return False
        if self._is_first and way is None and not launches:
            self._launches, self._program = False, name
        elif way is not None and not launches:
            self._launches = False
        self._is_first = False
        if way is not None or launches:
            self._way, self._program, self._positionals, self._letters = way, name, [], ""
        return True

    def _assignment(self, argument: str) -> str | None:  # noqa: PLR0911 - each reason why not
        """NAME=value with its value starred, or None where the argument has another form or no secret."""
        found = ASSIGNMENT.fullmatch(argument)
        if found is None or not found["value"]:
            return None
        words = kind_of(found["name"])
        value = found["value"]
        front = argument[: found.start("value")]
        if not words:
            if "wandb" in front.lower() and HEX40.fullmatch(value):
                return front + STARS
            if re.fullmatch(r"[\w.\[\]-]+=.*", value, re.DOTALL) and not TEXT_OF_A_COMMAND.search(value):
                inner = self._assignment(value)
                return None if inner is None else front + inner
            if "header" in front.lower() and ":" in value:
                return front + texts.header(value)
            return None
        if is_starred(value) or is_value_harmless(words, value):
            return None
        if value[0] in "[({\"'>":
            return None
        return front + self._assigned(value, words)

    def _behind_words(self, argument: str) -> str | None:
        """The argument, starred, where its position after certain words makes it a secret."""
        way = self._way
        positionals = self._positionals
        for rule in way.positional if way is not None else ():
            count = len(rule.words)
            if tuple(positionals[:count]) != rule.words or not set(rule.needs) <= set(self._letters):
                continue
            place = len(positionals) - count
            if not rule.begin <= place <= rule.end:
                continue
            masked = self._at(rule.kind, argument, place - rule.begin)
            if masked is not None:
                return masked
        if (
            positionals
            and NAME.fullmatch(positionals[-1])
            and positionals[-1] == self._previous
            and len(positionals) < 6
            and (
                programs.SETS.intersection(positionals[-4:-1])
                or self._program in programs.SETS
                or self._before in programs.PAIR_OPTIONS
            )
            and not argument.startswith(("http://", "https://"))
        ):
            return self._at("named", argument, 0)
        return None

    def _at(self, kind: SecretKind, argument: str, place: int) -> str | None:  # noqa: PLR0911 - a kind a branch
        if is_starred(argument) or argument == "-":
            return argument
        if kind == "named":
            name = self._positionals[-1]
            words = kind_of(name) if len(words_of(name)) > 1 or name.isupper() else ""
            if words_of(name)[:1] and words_of(name)[0] in VERBS:
                # kubectl config set-credentials ada
                return None
            is_one = bool(words) and not is_value_harmless(words, argument)
            return self._starred(argument, words) if is_one else None
        if kind == "pairs":
            words = kind_of(self._positionals[-1]) if self._positionals else ""
            return STARS if place % 2 == 1 and words and not is_value_harmless(words, argument) else None
        if kind == "basic":
            return STARS if self._positionals[-2].startswith("http-basic") else None
        if kind == "plain":
            return None if "=" in argument or is_value_harmless("token", argument) else STARS
        if kind == "secret":
            is_place = "://" in argument or argument.startswith(("\\", "/"))
            return None if is_place or is_value_harmless("password", argument) else STARS
        return self._value(kind, argument)


def arguments_starred(
    arguments: Sequence[str], text: Callable[[str, int], str], depth: int = 0, longest: int | None = None
) -> list[str]:
    """The arguments of a command line with every secret starred; `text` stars the secrets inside one argument.
    Stops after `longest` characters."""
    walker = _Walker(text, depth)
    masked, length = [], 0
    for argument in arguments:
        masked.append(walker.step(argument))
        length += len(masked[-1]) + 1
        if longest is not None and length > longest:
            break
    return masked


def line_starred(line: str, text: Callable[[str, int], str], depth: int) -> str:
    """A text with the secrets in its commands starred."""
    parts, done = [], 0
    has_escapes = "\\" in line

    def inner(value: str, _: int) -> str:
        # Text in quotes is searched again as a text; other text was searched before.
        return text(value, depth) if has_escapes or TEXT_OF_A_COMMAND.search(value) else value

    found = list(tokens.commands(line[:LONGEST_LINE]))
    for words, following in zip(found, [*found[1:], []], strict=True) if found else ():
        values = [word.value for word in words]
        masked = _piped(line, words, following, arguments_starred(values, inner, depth))
        for word, value, new in zip(words, values, masked, strict=True):
            raw = line[word.begin : word.end]
            shown = raw if new == value else tokens.quoted(new, word.quote)
            if new == value and not word.quote and TEXT_OF_A_COMMAND.search(value):
                # {"cmd":"curl -u ..."}
                shown = SEGMENT.sub(lambda found: found[1] + text(found[2], depth) + found[1], raw)
            if shown != raw:
                parts += [line[done : word.begin], shown]
                done = word.end
    return "".join([*parts, line[done:]])


def _piped(line: str, words: list[Token], following: list[Token], masked: list[str]) -> list[str]:
    """The words of a command with the password starred that it passes to another program: echo s3cret | docker
    login --password-stdin, and docker login --password-stdin <<< s3cret."""
    values = [word.value for word in words]
    if "<<<" in values and programs.READS_SECRET.search(line[words[0].begin : words[-1].end]):
        here = values.index("<<<") + 1
        masked[here : here + 1] = [STARS for _ in masked[here : here + 1]]
    is_written = following and values[0] in programs.WRITES_SECRET
    if (
        is_written
        and "|" in line[words[-1].end : following[0].begin]
        and programs.READS_SECRET.search(line[following[0].begin : following[-1].end])
    ):
        # The option of echo -n s3cret stays.
        return [values[0], *(one if re.fullmatch(r"-[a-zA-Z]", one) else STARS for one in values[1:])]
    return masked
