# Completion of clonefs for bash. `clonefs` itself says what a word may become (clonefs/cli/completion.py).

_clonefs() {
    local kind value
    COMPREPLY=()
    while IFS=$'\t' read -r kind value _; do
        case $kind in
            file) compopt -o default ;;
            dir) compopt -o dirnames ;;
            path | plain)
                COMPREPLY+=("$value")
                [[ $kind == plain ]] || compopt -o filenames
                [[ $value != *[/=,] ]] || compopt -o nospace
                ;;
        esac
    done < <(CLONEFS_LINE=${COMP_LINE:0:COMP_POINT} CLONEFS_WORD=$2 _CLONEFS_COMPLETE=bash_complete "$1" 2>/dev/null)
}

complete -o nosort -F _clonefs clonefs
