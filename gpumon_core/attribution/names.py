"""Finds the name by which people call a process: train.py for `python -u train.py`, not python."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath, PureWindowsPath

from gpumon_core.safety.text import LONGEST_OF, clean

# The kernel cuts the name of a command here (TASK_COMM_LEN - 1); the arguments have the full name.
COMM_LENGTH = 15
LONGEST = LONGEST_OF["name"]
# The most arguments of an interpreter to search for its script.
MOST_OPTIONS = 256
# The most characters of inline code to look at.
LONGEST_CODE = 4096
# Files with names that say nothing: the name of their folder is used.
UNNAMED_FILES = frozenset({"__main__.py", "__init__.py"})
# Names that PyTorch and Python themselves give to the first thread of a program.
THREADS = frozenset({"pt_main_thread", "MainThread"})
# The most interpreters that start each other, as the dynamic linker starts Python.
DEEPEST = 3


@dataclass(frozen=True, slots=True)
class CommandLine:
    """The parts of a command line. `name` is what people call it; `script` is the file, `module` the module and
    `code` the code that an interpreter runs. Code is never used as a name, because it may hold secrets.
    `arguments` are those of the script or program itself."""

    name: str | None = None
    script: str | None = None
    module: str | None = None
    code: str | None = None
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Interpreter:
    """The options with which an interpreter gets what it runs. Short options are letters; several may follow one
    dash. `takes` need a value, in the same argument or the next one; `ends` have their value in the
    same argument only; `code`, `module` and `script` say what is run. `verbs` may come before the script; code
    follows those that map to "code".
    """

    program: re.Pattern[str]
    takes: str = ""
    ends: str = ""
    code: str = ""
    module: str = ""
    script: str = ""
    long_takes: frozenset[str] = frozenset()
    long_code: frozenset[str] = frozenset()
    long_module: frozenset[str] = frozenset()
    long_script: frozenset[str] = frozenset()
    verbs: Mapping[str, str] = field(default_factory=dict)
    # java -Xmx2g, node -pe and R -e are words, not several letters.
    is_wordy: bool = False
    # The name of a class is its last part.
    is_dotted: bool = False
    # It runs another program, which has arguments of its own.
    is_loader: bool = False


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Sources: python(1), julia's src/jloptions.c, R(1) and Rscript(1), java(1), node(1), perlrun(1), ruby(1), lua(1),
# php(1), octave(1), bash(1), zshoptions(1), fish(1), ld.so(8).
INTERPRETERS: tuple[Interpreter, ...] = (
    Interpreter(
        re.compile(r"(?:python|pypy)[\d.]*(?:-[a-z]+)?[dt]?"),
        takes="WX",
        code="c",
        module="m",
        long_takes=_words("--check-hash-based-pycs"),
    ),
    Interpreter(
        re.compile(r"julia(?:-[\w.]+)?"),
        takes="HLJCtpOg",
        code="eE",
        module="m",
        long_takes=_words(
            "--threads --gcthreads --procs --machine-file --home --load --sysimage --cpu-target --startup-file"
            " --handle-signals --compiled-modules --pkgimages --history-file --depwarn --warn-overwrite"
            " --warn-scope"
            " --check-bounds --inline --polly --math-mode --compile --optimize-min --min-optlevel --color --banner"
            " --sysimage-native-code --bind-to --output-o --output-ji --output-bc --output-asm --output-unopt-bc"
            " --output-incremental --heap-size-hint --permalloc-pkgimg --trace-compile --trace-dispatch"
        ),
        long_code=_words("--eval --print"),
        long_module=_words("--module"),
    ),
    Interpreter(
        re.compile(r"R(?:script)?"),
        is_wordy=True,
        long_takes=_words("-g --gui -d --debugger --encoding --debugger-args --default-packages"),
        long_code=_words("-e"),
        long_script=_words("-f --file"),
        verbs={"CMD": "", "BATCH": ""},
    ),
    Interpreter(
        re.compile(r"java"),
        is_wordy=True,
        is_dotted=True,
        long_takes=_words(
            "-cp -classpath --class-path -p --module-path --upgrade-module-path --add-modules --add-opens"
            " --add-exports --add-reads --limit-modules --patch-module --enable-native-access --source"
        ),
        long_script=_words("-jar"),
        long_module=_words("-m --module"),
    ),
    Interpreter(
        re.compile(r"node(?:js)?|deno|bun"),
        is_wordy=True,
        long_takes=_words(
            "-r --require --import --loader --experimental-loader -C --conditions --input-type --env-file"
            " --env-file-if-exists --title --icu-data-dir --openssl-config --redirect-warnings --diagnostic-dir"
            " --report-dir --report-directory --report-filename --unhandled-rejections --dns-result-order"
            " --disable-warning --trace-event-categories --experimental-config-file --watch-path --config"
            " --import-map --lock --cert --preload --cwd"
        ),
        long_code=_words("-e --eval -p --print -pe"),
        verbs={"run": "", "serve": "", "eval": "code"},
    ),
    Interpreter(re.compile(r"perl[\d.]*"), takes="I", ends="0lCdDFimMVx", code="eE"),
    Interpreter(
        re.compile(r"ruby[\d.]*"),
        takes="IrCE",
        ends="0xWKFTi",
        code="e",
        long_takes=_words("--encoding --external-encoding --internal-encoding"),
    ),
    Interpreter(re.compile(r"lua(?:jit)?[\d.]*(?:-[\d.]+)?"), takes="lj", ends="ObW", code="e"),
    Interpreter(re.compile(r"php[\d.]*"), takes="dcz", code="rBRE", script="fF"),
    Interpreter(
        re.compile(r"octave(?:-cli|-gui)?(?:-[\d.]+)?"),
        takes="p",
        long_takes=_words("--path --exec-path --info-file --image-path --texi-macros-file"),
        long_code=_words("--eval"),
    ),
    Interpreter(
        re.compile(r"(?:ba|da|z|k|mk|a)?sh"),
        takes="oO",
        code="c",
        long_takes=_words("--rcfile --init-file --emulate"),
    ),
    Interpreter(
        re.compile(r"fish"),
        takes="CDdof",
        code="c",
        long_takes=_words("--init-command --features --debug --debug-output --profile"),
        long_code=_words("--command"),
    ),
    Interpreter(
        re.compile(r"dotnet|mono(?:-sgen)?"),
        is_wordy=True,
        long_takes=_words(
            "--additionalprobingpath --additional-deps --depsfile --fx-version --roll-forward --runtimeconfig"
            " --config --project"
        ),
        verbs={"exec": "", "run": ""},
    ),
    Interpreter(
        re.compile(r"ld-[\w.-]+\.so[\d.]*|ld\.so"),
        is_loader=True,
        is_wordy=True,
        long_takes=_words("--library-path --inhibit-rpath --argv0 --preload --audit --glibc-hwcaps-prepend"),
    ),
)


# The code with which multiprocessing and similar libraries start a worker: its methods "spawn" and "forkserver"
# (the ones that work with CUDA), joblib's loky, mpi4py (used by TensorRT-LLM), PyTorch's compilers, and the
# clusters of R and Julia.
WORKER_CODE = re.compile(
    r"from (?:multiprocessing|multiprocess|billiard)\.\w+ import|parallel:::\.(?:work|slave)RSOCK"
)
WORKER_MODULE = re.compile(r"(?:joblib\.externals\.)?loky\.backend\.popen_loky_\w+|mpi4py\.futures\.server")
WORKER_SCRIPT = re.compile(r".*/torch/_inductor/compile_worker/__main__\.py")
WORKER_OPTIONS = re.compile(r"--multiprocessing-fork|--worker(?:=.*)?")


def is_worker(line: CommandLine, arguments: Sequence[str]) -> bool:
    """Whether a program started an interpreter as its worker, which runs nothing with a name of its own."""
    if line.code is not None:
        return WORKER_CODE.search(line.code[:LONGEST_CODE]) is not None
    if line.module is not None:
        return WORKER_MODULE.fullmatch(line.module) is not None
    if line.script is not None:
        return WORKER_SCRIPT.fullmatch(line.script) is not None
    return any(WORKER_OPTIONS.fullmatch(argument) for argument in arguments[1:MOST_OPTIONS])


def readable(comm: str, arguments: Sequence[str]) -> str:
    """The name of a process, from the kernel's name for it (as text of os.fsdecode) and its arguments."""
    name = taken_apart(arguments).name or _of_program(comm, arguments)
    return clean(name.encode("utf-8", "surrogateescape").decode("utf-8", "replace"), LONGEST)


def taken_apart(arguments: Sequence[str], depth: int = 0) -> CommandLine:
    """The parts of a command line; without a name where only the kernel has one."""
    if not arguments:
        return CommandLine()
    program = arguments[0].rsplit("/", 1)[-1]
    for interpreter in INTERPRETERS:
        if interpreter.program.fullmatch(program):
            return _of_interpreter(interpreter, program, arguments, depth)
    return CommandLine(arguments=tuple(arguments[1:]))


def _of_program(comm: str, arguments: Sequence[str]) -> str:
    if not arguments:
        return comm
    if arguments[0].lower().endswith(".exe"):
        # A Windows program under Wine or Proton.
        return PureWindowsPath(arguments[0]).name or comm
    if comm in THREADS:
        # It has set a title, or is a program with Python inside.
        return arguments[0].rsplit("/", 1)[-1] or comm
    # As bytes: the kernel may have cut inside a character.
    cut = comm.encode("utf-8", "surrogateescape")
    if len(cut) >= COMM_LENGTH:
        program = arguments[0].rsplit("/", 1)[-1]
        if program.encode("utf-8", "surrogateescape").startswith(cut):
            return program
    return comm


def _of_interpreter(interpreter: Interpreter, program: str, arguments: Sequence[str], depth: int) -> CommandLine:
    kind, value, position = _what_it_runs(interpreter, arguments)
    rest = tuple(arguments[position:])
    if kind == "code":
        name = f"{program} -c" if interpreter.code == "c" and interpreter.module else program
        return CommandLine(name, code=value, arguments=rest)
    if kind == "module":
        name = value.removesuffix(".__main__")
        if interpreter.is_dotted:
            # MODULE/CLASS
            name = name.rsplit("/", 1)[-1].rsplit(".", 1)[-1]
        return CommandLine(name or None, module=value or None, arguments=rest)
    if kind != "script":
        return CommandLine()
    if interpreter.is_loader and depth < DEEPEST:
        inner = taken_apart(arguments[position - 1 :], depth + 1)
        if inner.name:
            return inner
    file = _script(value)
    if interpreter.is_dotted and file and "-jar" not in arguments[:position]:
        file = file.rsplit(".", 1)[-1]
    return CommandLine(file, script=value or None, arguments=rest)


def _what_it_runs(interpreter: Interpreter, arguments: Sequence[str]) -> tuple[str, str, int]:
    """Whether an interpreter runs a script, a module or code, which, and where its own arguments begin."""
    position, has_ended = 1, False
    while position < min(len(arguments), MOST_OPTIONS):
        argument = arguments[position]
        position += 1
        if has_ended or not argument.startswith(("-", "+")) or len(argument) < 2:
            # "-" is the standard input.
            if argument in ("", "-", "+"):
                break
            if has_ended or argument not in interpreter.verbs:
                return "script", argument, position
            kind, value = interpreter.verbs[argument], None
        elif argument == "--":
            has_ended = True
            continue
        elif argument.startswith("--") or interpreter.is_wordy:
            kind, value = _long(interpreter, argument)
        else:
            kind, value = _letters(interpreter, argument)
        if kind and value is None:
            value = arguments[position] if position < len(arguments) else ""
            position += 1
        if kind and kind != "takes":
            return kind, value or "", position
    return "", "", position


def _long(interpreter: Interpreter, argument: str) -> tuple[str, str | None]:
    """The meaning of a long option, and its value where that is in the same argument."""
    option, separator, value = argument.partition("=")
    for kind, options in (
        ("takes", interpreter.long_takes),
        ("code", interpreter.long_code),
        ("module", interpreter.long_module),
        ("script", interpreter.long_script),
    ):
        if option in options:
            return kind, value if separator else None
    return "", None


def _letters(interpreter: Interpreter, argument: str) -> tuple[str, str | None]:
    """The same for letters behind one dash: "-uBm", "-lane", "-Wignore"."""
    for place, letter in enumerate(argument[1:], 1):
        rest = argument[place + 1 :] or None
        for kind, letters in (
            ("takes", interpreter.takes),
            ("code", interpreter.code),
            ("module", interpreter.module),
            ("script", interpreter.script),
        ):
            if letter in letters:
                # A shell's -c takes its code from the next argument, and more letters may follow it.
                return kind, None if kind == "code" and interpreter.program.fullmatch("sh") else rest
        if letter in interpreter.ends:
            if letter in "0l" and rest:
                # A number in octal, and more letters behind it.
                continue
            break
    return "", None


def _script(path: str | None) -> str | None:
    if not path:
        return None
    file = PurePosixPath(path)
    if file.name in UNNAMED_FILES and file.parent.name:
        return file.parent.name
    return file.name or None
