
# fish 3 tells no place of the cursor where it runs without a terminal: complete -C.
function __@NAME@_tokens
    if contains -- -tC $argv
        string length -- "$(commandline -ct)"
    else if test (string split -m 1 -f 1 -- . "$FISH_VERSION") -gt 3
        commandline --tokens-raw $argv
    else
        commandline -o $argv
    end
end

# A program that cannot be run offers nothing.
functions -q __@NAME@_loud_completion; and functions -e __@NAME@_loud_completion
functions -c __@NAME@_custom_completion __@NAME@_loud_completion
function __@NAME@_custom_completion
    __@NAME@_loud_completion $argv 2>/dev/null
end

# The tool's -c is its command create.
if test @NAME@ = dscow_tool
    complete -c dscow_tool -n 'contains -- -c (commandline -opc)[2]' -F
end
