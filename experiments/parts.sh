# shellcheck shell=bash
# shellcheck disable=SC2154,SC2034 # read_flags sets the variables; the script that sources this file uses them
# Sourced by both experiments: their flags, and their parts, which run in turn or as SLURM jobs.
# shellcheck source=src/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/../src/env.sh"
# shellcheck source=src/slurm.sh
source "$ROOT/src/slurm.sh"

declare -A method_flag=([DPO]="" [KLDPO]=--kldpo_tau [WDPO]=--wdpo_rho) job_of=()
part_found=false
tiny_flags=(
    --model_path="$ROOT/models/SmolLM2-135M" --reward_model="$ROOT/models/ArmoRM-SmolLM2"
    --dataset="$ROOT/datasets/embedded_prompts" --max_new_tokens=32 --prompt_max_len=256 --prompts=16
    --beta=0.1 --learning_rate=2e-5 --train_batch_size=4 --max_epochs=1 --max_len=512
)

# read_flags FLAG...: set a variable per flag; its default is the one in `usage`. --tiny puts `tiny_flags` first.
read_flags() {
    local flag
    names=() words=("$@") part=""
    while IFS= read -r flag; do
        flag="${flag//\"/}" flag="${flag#--}"
        names+=("${flag%%=*}")
        printf -v "${flag%%=*}" '%s' "${flag#*=}"
    done < <(usage | grep -oE -- '--[a-z_]+=("[^"]*"|[^ ]*)')
    parse_flags "$@"
    [[ "$tiny" == false ]] || parse_flags "${tiny_flags[@]}" "$@"
}

# parse_flags FLAG...: set a variable for every --NAME=VALUE, and `further` to what follows "--".
parse_flags() {
    local name
    further=()
    while (($#)); do
        name="${1%%=*}" name="${name#--}"
        case "$1" in
            -h | --help)
                usage
                exit
                ;;
            --)
                further=("${@:2}")
                break
                ;;
            --tiny | --slurm) printf -v "$name" true ;;
            --*=*)
                [[ " ${names[*]} part " == *" $name "* ]] || refuse_command "unknown flag: $1; --help lists the flags"
                printf -v "$name" '%s' "${1#*=}"
                ;;
            *) refuse_command "unknown argument: $1; --help lists the flags" ;;
        esac
        shift
    done
    for name in tiny slurm; do
        [[ "${!name}" == true || "${!name}" == false ]] || refuse_command "--$name=${!name}: pass true or false"
    done
}

# collect ARRAY NAME...: set ARRAY to the flag --NAME=VALUE of every variable that is not empty.
collect() {
    local -n array="$1"
    local name
    array=()
    for name in "${@:2}"; do
        [[ -z "${!name}" ]] || array+=("--$name=${!name}")
    done
}

# prepare: install the embedded models for --tiny, and look for sbatch for --slurm.
prepare() {
    [[ -z "$part" ]] || return 0
    if [[ "$slurm" == true ]]; then
        command -v sbatch >/dev/null || refuse_command "--slurm: sbatch is not installed; omit --slurm to run here"
        mkdir -p "$output_path/logs"
    fi
    if [[ "$tiny" == true ]]; then
        run bash "$ROOT/setup.sh" --models=embedded --datasets=embedded
        # shellcheck source=src/env.sh
        source "$ROOT/src/env.sh" # The environment may be new.
    fi
}

# part NAME NEEDS COMMAND...: run COMMAND, or with --slurm submit it as a job that starts after the parts in NEEDS.
part() {
    local need dependency="" options
    if [[ -n "$part" ]]; then # This process is such a job.
        if [[ "$part" == "$1" ]]; then
            part_found=true
            "${@:3}"
        fi
        return
    fi
    if [[ "$slurm" == false ]]; then
        printf '\n== %s (%d s)\n' "$1" "$SECONDS"
        "${@:3}"
        return
    fi
    for need in $2; do dependency+=":${job_of[$need]}"; done
    read -ra options <<<"$sbatch"
    job_of[$1]="$(sbatch --parsable --job-name="drdpo-${1//\//-}" --nodes=1 --requeue --signal=B:USR1@300 --open-mode=append \
        --output="$output_path/logs/%x-%j.log" ${dependency:+--dependency="afterok$dependency"} "${options[@]}" \
        --wrap "exec $(printf '%q ' bash "$ROOT/experiments/$(basename "$0")" --part="$1" "${words[@]}")")"
    job_of[$1]="${job_of[$1]%%;*}"
    echo "submitted ${job_of[$1]}: $1${dependency:+, after${dependency//:/ }}"
}

# finish: the last line of an experiment.
finish() {
    [[ -z "$part" || "$part_found" == true ]] || refuse_command "--part=$part: no such part"
    [[ "$slurm" == false || -n "$part" ]] || printf 'after the last job, the report is '
    echo "$output_path/report.md"
}

# step COMMAND...: run a command, in a SLURM job as a part of it, which queues the job again before its time limit.
step() {
    if [[ -z "$part" ]]; then
        run "$@"
    else
        DRDPO_NODES=1 job_step "$@" # openllm_eval.slurm is not to queue it too.
    fi
}

# sample FOLDER MODEL FLAG...: sample and score completions.
sample() {
    local flags
    collect flags dataset reward_model max_new_tokens prompt_max_len
    step bash "$ROOT/generate_completions.sh" --save_path="$1" --model_path="$2" "${flags[@]}" "${@:3}" \
        ${prompts:+--max_prompts="$prompts"}
}

# train FOLDER MODEL PAIRS SEED METHOD[=VALUE]: VALUE is tau or rho.
train() {
    local flags
    collect flags beta learning_rate train_batch_size max_epochs max_len
    [[ "$5" == DPO ]] || flags+=("${method_flag[${5%%=*}]}=${5#*=}")
    [[ "$tiny" == false ]] || flags+=(--micro_batch_size=2 --gradient_checkpointing=false --save_resume=false)
    step bash "$ROOT/train_alignment.sh" --model_path="$2" --dataset_path="$3" --save_path="$1" --seed="$4" \
        "${flags[@]}" "${further[@]}"
}

# checkpoint FOLDER STEP: print the path of the checkpoint of a step, or of the last one for "last".
checkpoint() {
    local found="$1/global_step_$2"
    [[ "$2" != last ]] || found="$(find "$1" -maxdepth 1 -name 'global_step_*' | sort -V | tail -n 1)"
    if [[ ! -d "$found" ]]; then
        echo "error: $1 has no checkpoint of step $2; found: $(cd "$1" && echo global_step_*)" >&2
        return 1
    fi
    printf '%s' "$found"
}
