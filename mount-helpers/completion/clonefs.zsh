#compdef clonefs
# Completion of clonefs for zsh. `clonefs` itself says what a word may become (clonefs/cli/completion.py).

_clonefs() {
    local kind value what shown
    local -a ends goes_on ends_shown goes_on_shown
    while IFS=$'\t' read -r kind value what; do
        case $kind in
            file) _files ;;
            dir) _files -/ ;;
            path | plain)
                [[ $kind == plain ]] && shown=$value || shown=${${value%/}:t}
                if [[ $value == *[/=,] ]]; then
                    goes_on+=("$value") goes_on_shown+=("$shown${what:+  -- $what}")
                else
                    ends+=("$value") ends_shown+=("$shown${what:+  -- $what}")
                fi
                ;;
        esac
    done < <(CLONEFS_WORDS=${(F)${(@Q)words[1,CURRENT-1]}} CLONEFS_WORD=${(Q)PREFIX} _CLONEFS_COMPLETE=zsh_complete ${(Q)words[1]} 2>/dev/null)
    (( $#ends )) && compadd -V clonefs -l -d ends_shown -a ends
    (( $#goes_on )) && compadd -V clonefs-on -l -S '' -d goes_on_shown -a goes_on
}

# Loaded by compinit from a directory of fpath, or evaluated.
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    _clonefs "$@"
else
    compdef _clonefs clonefs
fi
