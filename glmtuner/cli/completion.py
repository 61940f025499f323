"""`completion bash|zsh|fish`: the script by which a shell completes groups, presets, keys, values, verbs and folders."""

import argparse
import shlex
import sys

from glmtuner.cli.complete import OPEN_ENDS, ROOT
from glmtuner.errors import ConfigError

HELP = "a script by which bash, zsh or fish completes commands"
TAKES = "bash|zsh|fish"  # in the help

RUN = "import sys; sys.path.append(sys.argv.pop(1)); from glmtuner.cli.complete import main; main(sys.argv[1:])"

BASH = """\
# bash completion of glmtuner: eval "$(python -m glmtuner completion bash)"
_glmtuner() {
    local line="${COMP_LINE:0:COMP_POINT}" found
    compopt +o default +o bashdefault 2>/dev/null
    mapfile -t found < <(@RUN@ line "$line" "$COMP_WORDBREAKS" 2>/dev/null)
    COMPREPLY=("${found[@]%%$'\\t'*}")
    if [[ ${#COMPREPLY[@]} -gt 0 && "${COMPREPLY[*]: -1}" == *[@OPEN@] ]]; then
        compopt -o nospace 2>/dev/null
    fi
}
_glmtuner_python() {
    local pattern='[[:space:]]-m[[:space:]]+glmtuner[[:space:]]'
    if [[ "${COMP_LINE:0:COMP_POINT}" =~ $pattern ]]; then
        _glmtuner
    elif [[ -n "$_glmtuner_before" ]]; then
        "$_glmtuner_before" "$@"
    fi
}
if [[ -z "$_glmtuner_before" ]]; then
    declare -F _comp_load >/dev/null && _comp_load python >/dev/null 2>&1
    declare -F _completion_loader >/dev/null && _completion_loader python >/dev/null 2>&1
    _glmtuner_before=$(complete -p python 2>/dev/null | sed -n 's/.*-F \\([^ ]*\\).*/\\1/p')
    [[ "$_glmtuner_before" == _glmtuner_python ]] && _glmtuner_before=
fi
complete -F _glmtuner glmtuner
complete -o default -o bashdefault -F _glmtuner_python python python3
"""

ZSH = """\
# zsh completion of glmtuner: eval "$(python -m glmtuner completion zsh)"
_glmtuner() {
    local -a found open opened closed shown
    local line word
    found=("${(@f)$(@RUN@ words "${(@)words[1,CURRENT-1]}" "${(Q)PREFIX}" 2>/dev/null)}")
    for line in "${found[@]}"; do
        word="${line%%$'\\t'*}"
        [[ -z "$word" ]] && continue
        line="$word${${line#*$'\\t'}:+  -- ${line#*$'\\t'}}"
        if [[ "$word" == *[@OPEN@] ]]; then
            open+=("$word"); opened+=("$line")
        else
            closed+=("$word"); shown+=("$line")
        fi
    done
    (( $#open )) && compadd -l -S '' -d opened -a open
    (( $#closed )) && compadd -l -d shown -a closed
    (( $#open + $#closed ))
}
_glmtuner_python() {
    local at=${words[(i)-m]}
    if (( at + 1 < CURRENT )) && [[ "${words[at + 1]}" == glmtuner ]]; then
        _glmtuner
    else
        "${_glmtuner_before:-_default}" "$@"
    fi
}
if ! (( $+functions[compdef] )); then
    autoload -Uz compinit && compinit
fi
if [[ -z "$_glmtuner_before" ]]; then
    typeset -g _glmtuner_before="${_comps[python]}"
fi
compdef _glmtuner glmtuner
compdef _glmtuner_python python python3
"""

FISH = """\
# fish completion of glmtuner: python -m glmtuner completion fish | source
function __glmtuner_complete
    @RUN@ line (commandline -cp | string collect) 2>/dev/null
end
function __glmtuner_is_module
    string match -qr -- '\\s-m\\s+glmtuner\\s' (commandline -cp | string collect)
end
complete -c glmtuner -f -k -a '(__glmtuner_complete)'
complete -c python -n __glmtuner_is_module -f -k -a '(__glmtuner_complete)'
complete -c python3 -n __glmtuner_is_module -f -k -a '(__glmtuner_complete)'
"""

SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=tuple(SCRIPTS), help="the shell that reads the script")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from glmtuner.console import plain

    if overrides:
        raise ConfigError(
            f"{overrides[0]}: completion takes the name of a shell; type python -m glmtuner completion bash"
        )
    print(plain(script(arguments.shell)), end="")
    return 0


def script(shell: str) -> str:
    """The script for a shell, which calls this Python on this copy of the package."""
    # without site-packages (-S), which complete.py does without: starting Python takes a third of the time
    words = [sys.executable, "-I", "-S", "-c", RUN, str(ROOT)]
    signs = "".join(OPEN_ENDS)
    return SCRIPTS[shell].replace("@RUN@", quoted(shell, words)).replace("@OPEN@", signs)


def quoted(shell: str, words: list[str]) -> str:
    """The words of a command in the syntax of a shell."""
    if shell != "fish":
        return shlex.join(words)
    return " ".join("'" + word.replace("\\", "\\\\").replace("'", "\\'") + "'" for word in words)
