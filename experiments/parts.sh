# shellcheck shell=bash
# shellcheck disable=SC2154,SC2034 # variables of the script that sources it
# Sourced by the experiments: flags, parts that can run one after another or as SLURM jobs, and what a part needs.
# A script sets `names` (its flags), their defaults as variables, `script`, and the functions usage, list_parts, needs, do_part.
# shellcheck source=src/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/../src/env.sh"

# parse_flags WORD...: set a variable for every --NAME=VALUE, and `further` to the words after "--". Sets `given` too.
parse_flags() {
    local word name
    given=() further=()
    while (($#)); do
        word="$1"
        shift
        case "$word" in
            -h | --help)
                usage
                exit
                ;;
            --)
                further=("$@")
                break
                ;;
            --tiny) word=--tiny=true ;;
            --slurm) word=--slurm=true ;;
        esac
        name="${word%%=*}" name="${name#--}"
        if [[ "$word" != --*=* || " ${names[*]} part " != *" $name "* ]]; then
            usage >&2
            refuse_command "unknown flag: $word"
        fi
        if [[ "$name" != part ]]; then
            given+=("$word")
        fi
        printf -v "$name" '%s' "${word#*=}"
    done
    for name in tiny slurm; do
        [[ "${!name}" == true || "${!name}" == false ]] || refuse_command "--$name=${!name}: give true or false"
    done
    ((${#further[@]} == 0)) || given+=(-- "${further[@]}")
}

# is_given NAME: does the command line hold --NAME=...?
is_given() {
    [[ -n "$(printf '%s\n' "${given[@]+"${given[@]}"}" | sed -n "/^--\$/q; /^--$1=/p")" ]]
}

# default NAME VALUE: a value for a flag that is not given.
default() {
    is_given "$1" || printf -v "$1" '%s' "$2"
}

# settle: one folder, one set of flags: parts made with others would be mixed, or refused halfway.
settle() {
    local name settings=""
    for name in "${names[@]}"; do
        case "$name" in output_path | jobs | slurm | sbatch) ;; *) settings+="$name=${!name}"$'\n' ;; esac
    done
    settings+="further=${further[*]+"${further[*]}"}"
    mkdir -p "$output_path"
    if [[ -f "$output_path/settings" && "$(<"$output_path/settings")" != "$settings" ]]; then
        diff <(cat "$output_path/settings") <(printf '%s\n' "$settings") >&2 || true
        refuse_command "$output_path was made with other flags (above, < is there); give another --output_path"
    fi
    if [[ ! -f "$output_path/settings" ]]; then
        # Whole or not at all: jobs that begin together read it.
        printf '%s\n' "$settings" >"$output_path/.settings.$$"
        mv "$output_path/.settings.$$" "$output_path/settings"
    fi
    output_path="$(cd "$output_path" && pwd)"
}

# say WORDS: where the experiment is.
say() {
    printf '\n== %s (%d s)\n' "$1" "$SECONDS"
}

# step COMMAND...: run a command; under SLURM one that ends by SIGUSR1, shortly before the time limit, is queued again.
step() {
    local status=0
    if [[ -z "${SLURM_JOB_ID:-}" ]]; then
        run "$@"
        return
    fi
    printf '+ %s\n' "$(printf '%q ' "$@")" >&2
    run_noting "$@" || status=$?
    if ((status != 0)) && [[ "$last_signal" == USR1 ]]; then
        run scontrol requeue "$SLURM_JOB_ID"
    fi
    return "$status"
}

# checkpoint FOLDER STEP: the checkpoint of a step, or the last one for "last".
checkpoint() {
    local found
    if [[ "$2" == last ]]; then
        found="$(find "$1" -maxdepth 1 -name 'global_step_*' | sort -V | tail -n 1)"
    else
        found="$1/global_step_$2"
    fi
    if [[ -z "$found" || ! -d "$found" ]]; then
        echo "error: $1 has no checkpoint of step $2; there are: $(cd "$1" && echo global_step_*)" >&2
        exit 1
    fi
    printf '%s' "$found"
}

# method_flags METHOD VALUE: sets `flags` for train_alignment.sh.
method_flags() {
    case "$1" in
        DPO) flags=() ;;
        KLDPO) flags=(--kldpo_tau="$2") ;;
        WDPO) flags=(--wdpo_rho="$2") ;;
        *) refuse_command "method $1: give DPO, KLDPO or WDPO" ;;
    esac
}

# submit_parts PART...: one SLURM job a part, after those that it needs.
submit_parts() {
    local part need id dependency options
    declare -A ids
    command -v sbatch >/dev/null || refuse_command "--slurm=true: sbatch is not on this machine; leave the flag out to run here"
    read -ra options <<<"$sbatch"
    mkdir -p "$output_path/logs"
    for part in "$@"; do
        dependency=""
        while read -r need; do
            [[ -z "$need" ]] || dependency+=":${ids[$need]}"
        done < <(needs "$part")
        id="$(sbatch --parsable --job-name="drdpo-${part//\//-}" --nodes=1 --requeue --signal=B:USR1@300 --open-mode=append \
            --output="$output_path/logs/%x-%j.log" ${dependency:+--dependency="afterok$dependency"} \
            ${options[@]+"${options[@]}"} --wrap "exec $(printf '%q ' bash "$script" --part="$part" "${given[@]+"${given[@]}"}")")"
        ids[$part]="${id%%;*}"
        echo "submitted ${ids[$part]}: $part${dependency:+, after${dependency//:/ }}"
    done
    echo "report, once all are done: $output_path/report.md"
}

# run_at_once COUNT PART...: so many parts at a time, each a process of its own with its share of the cores and a log in logs/,
# after those that it needs. Where one fails the others that run are waited for, and no further ones begin.
run_at_once() {
    local count="$1" total=$(($# - 1)) part ready waiting=("${@:2}") left cores failed=""
    declare -A ended=() part_of=()
    cores="$(getconf _NPROCESSORS_ONLN)"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > count ? cores / count : 1))}"
    mkdir -p "$output_path/logs"
    trap 'stop_parts 130' INT
    trap 'stop_parts 143' TERM
    trap 'stop_parts 129' HUP
    while ((${#waiting[@]})) && [[ -z "$failed" ]]; do
        ready=() left=()
        for part in "${waiting[@]}"; do
            if is_ready "$part"; then ready+=("$part"); else left+=("$part"); fi
        done
        ((${#ready[@]})) || refuse_command "these parts wait for each other: ${waiting[*]}"
        for part in "${ready[@]}"; do
            ((${#part_of[@]} < count)) || await_part
            [[ -z "$failed" ]] || break
            set -m
            bash "$script" --part="$part" "${given[@]+"${given[@]}"}" >"$output_path/logs/${part//\//-}.log" 2>&1 </dev/null &
            set +m
            part_of[$!]="$part"
        done
        while ((${#part_of[@]})); do await_part; done
        waiting=(${left[@]+"${left[@]}"})
    done
    trap - INT TERM HUP
    [[ -z "$failed" ]]
}

# stop_parts STATUS: end the parts that run, and wait until they have: one that saves must not meet the next start. Each
# leads a process group, so that it ends whole.
# shellcheck disable=SC2329 # the traps call it
stop_parts() {
    local pid
    trap '' INT TERM HUP
    for pid in "${!part_of[@]}"; do kill -- "-$pid" 2>/dev/null || true; done
    for pid in "${!part_of[@]}"; do
        while kill -0 -- "-$pid" 2>/dev/null; do sleep 0.2; done
    done
    exit "$1"
}

# is_ready PART: have those that it needs ended?
# shellcheck disable=SC2329 # run_at_once calls it
is_ready() {
    local need
    while read -r need; do
        [[ -z "$need" || -n "${ended[$need]:-}" ]] || return 1
    done < <(needs "$1")
}

# await_part: wait until a part ends; sets `failed` where it failed, and shows the end of its log.
await_part() {
    local pid name status
    while true; do
        for pid in "${!part_of[@]}"; do
            # Not `wait -n`, which tells no process before bash 5.1.
            [[ $'\n'"$(jobs -rp)"$'\n' == *$'\n'"$pid"$'\n'* ]] || break 2
        done
        sleep 1
    done
    status=0 name="${part_of[$pid]}"
    wait "$pid" || status=$?
    unset "part_of[$pid]"
    if ((status)); then
        failed="$name"
        tail -n 15 "$output_path/logs/${name//\//-}.log" >&2
        echo "error: $name ended with status $status (logs/${name//\//-}.log); the same command goes on from there" >&2
        return
    fi
    ended[$name]=1
    echo "$name ended, ${#ended[@]} of $total ($SECONDS s)"
}

# run_experiment: all parts here, one of them, or all of them as jobs.
run_experiment() {
    local all
    mapfile -t all < <(list_parts)
    if [[ -n "${part:-}" ]]; then
        [[ $'\n'"$(printf '%s\n' "${all[@]}")"$'\n' == *$'\n'"$part"$'\n'* ]] ||
            refuse_command "--part=$part: there is no such part; the parts are ${all[*]}"
        all=("$part")
    elif [[ "$slurm" == true ]]; then
        ((${jobs:-1} == 1)) || refuse_command "--jobs=$jobs with --slurm: the cluster decides how many jobs run at once; leave it out"
        submit_parts "${all[@]}"
        return
    elif ((${jobs:-1} > 1)); then
        ! has_gpu || refuse_command "--jobs=$jobs: every part takes all GPUs; leave it out, or submit the parts with --slurm"
        run_at_once "$jobs" "${all[@]}"
        all=()
    fi
    for part in ${all[@]+"${all[@]}"}; do
        say "$part"
        do_part "$part"
    done
    echo "done: $output_path"
}
