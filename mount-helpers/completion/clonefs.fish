# Completion of clonefs for fish. `clonefs` itself says what a word may become (clonefs/cli/completion.py).

function __clonefs_complete
    set -l words (commandline -opc)
    set -l typed (commandline -ct)
    set -lx CLONEFS_WORD (string unescape -- $typed; or string trim --left --chars '"\'' -- $typed)
    set -lx CLONEFS_WORDS (string join \n -- $words | string collect)
    set -lx _CLONEFS_COMPLETE fish_complete
    for line in ($words[1] 2>/dev/null)
        set -l parts (string split \t -- $line)
        switch $parts[1]
            case file
                __fish_complete_path "$CLONEFS_WORD"
            case dir
                __fish_complete_directories "$CLONEFS_WORD" ''
            case path plain
                printf '%s\t%s\n' $parts[2] "$parts[3]"
        end
    end
end

complete --command clonefs --no-files --keep-order --arguments '(__clonefs_complete)'
