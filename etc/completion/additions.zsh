# A program that cannot be run offers nothing.
__@NAME@_custom_complete() {
    local -a completions
    completions=("${(@f)"$("${command_name}" "${@}" "${command_line[@]}" 2>/dev/null)"}")
    if [[ "${#completions[@]}" -gt 1 ]]; then
        __@NAME@_complete "${completions[@]:0:-1}"
    fi
}

# What goes on gets no blank behind it.
__@NAME@_complete() {
    local -a ends goesOn
    goesOn=("${(M)@:#*[:=/]}")
    ends=("${@:#*[:=/]}")
    [[ "${#goesOn[@]}" -eq 0 ]] || compadd -S '' -a goesOn
    [[ "${#ends[@]}" -eq 0 ]] || compadd -a ends
}

# The tool's -c is its command create.
if [[ @NAME@ = dscow_tool ]]; then
    functions[_@NAME@]='[[ "${words[2]}" = -c && CURRENT -gt 2 ]] && words[2]=create
'"${functions[_@NAME@]}"
fi

