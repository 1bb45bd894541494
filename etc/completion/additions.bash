
# A word that the program offered, or that stands in a list, is text: compgen -W would expand it as
# the shell does, and run what a file's name or a domain's says.
__@NAME@_add_completions() {
    local completion
    if [[ "${1}" = -W ]]; then
        while IFS='' read -r completion; do
            [[ -n "${completion}" && "${completion}" = "${cur}"* ]] && COMPREPLY+=("${completion}")
        done <<<"${2}"
    else
        while IFS='' read -r completion; do
            COMPREPLY+=("${completion}")
        done < <(IFS=$'\n' compgen "${@}" -- "${cur}")
    fi
}

__@NAME@_custom_complete() {
    "${COMP_WORDS[0]}" "${@}" "${COMP_WORDS[@]}" 2>/dev/null
}

# bash cuts words at : and =. This joins them again, up to the cursor, has them completed, and takes
# off what the line has already. An option with its value behind = is two words.
__@NAME@_joined() {
    local rest="${COMP_LINE:0:${COMP_POINT}}" word='' blanks
    local -a joined=()
    local -i index
    for ((index = 0; index <= COMP_CWORD; index++)); do
        word="${COMP_WORDS[index]}"
        blanks="${rest%%[![:blank:]]*}"
        rest="${rest#"${blanks}"}"
        if ((index == COMP_CWORD)); then word="${rest}"; fi
        rest="${rest#"${word}"}"
        if [[ -z "${blanks}" && index -gt 0 && ("${word}" = [:=]* || "${joined[-1]}" = *[:=]) ]]; then
            joined[-1]+="${word}"
        else
            joined+=("${word}")
        fi
    done
    if [[ "${joined[-1]}" = --*=* ]]; then
        word="${joined[-1]}"
        joined[-1]="${word%%=*}"
        joined+=("${word#*=}")
    fi
    # The program's -c is its command create.
    [[ @NAME@ = dscow_tool && "${joined[1]}" = -c && ${#joined[@]} -gt 2 ]] && joined[1]=create

    local -a COMP_WORDS=("${joined[@]}")
    local -i COMP_CWORD=$((${#joined[@]} - 1))
    local COMP_LINE="${joined[*]}"
    local -i COMP_POINT=${#COMP_LINE}
    local -r whole="${joined[-1]}"
    _@NAME@ "${1}" "${whole}" "${joined[-2]:-}"

    local -r done="${whole%"${2}"}"
    local isPlain=yes
    for index in "${!COMPREPLY[@]}"; do
        word="${COMPREPLY[index]#"${done}"}"
        COMPREPLY[index]="${word}"
        [[ "${word}" = *[!A-Za-z0-9_.,:=/+-]* || -e "${word}" ]] && isPlain=
    done
    # What is no file needs no quotes for its : and =. What goes on gets no blank behind it.
    [[ -n "${isPlain}" && ${#COMPREPLY[@]} -gt 0 ]] && compopt +o filenames 2>/dev/null
    [[ "${COMPREPLY[0]:-}" = *[:=/] ]] && compopt -o nospace 2>/dev/null
    return 0
}

complete -o bashdefault -o default -o filenames -F __@NAME@_joined @NAME@
