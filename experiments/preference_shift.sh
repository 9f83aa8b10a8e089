#!/usr/bin/env bash
# A preference shift, small: train on one mixture of objectives, on flipped labels, on a skewed population of raters, and see
# what every method is worth on the others. Embedded models, no GPU. Ends in <output_path>/report.md; docs/preference_shift.md
# tells what came out. What is done is skipped when the command is given again.
set -euo pipefail
script="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/$(basename "${BASH_SOURCE[0]}")"

usage() {
    cat <<'USAGE'
usage: bash experiments/preference_shift.sh [--tiny] [--slurm] [--NAME=VALUE ...] [-- FLAGS OF train_alignment.sh ...]
  --output_path=outputs/preference_shift   where everything goes; one folder, one set of flags
  --model_path=models/SmolLM2-135M --reward_model=models/ArmoRM-SmolLM2 --dataset=datasets/embedded_prompts
  --first=ultrafeedback_overall_score --second=helpsteer_complexity   the objectives that training sees
  --arms="objectives noise populations"    labels by half of each; the same, a share of them flipped; most by the first alone, few by the second
  --flipped=0.25 --minority=0.15   these shares of the training pairs
  --methods="DPO=0.05,0.2 cDPO=0.1,0.3 IPO=0.05,0.2 DrDPO=0.5,2 KLDPO=0.05,0.5 WDPO=0.002,0.01 WDPO-root=0.02,0.1"
                                   each with the strengths to choose from, by the gain in both objectives of the answers to validation
                                   prompts, after training in the arm `objectives`: beta, smoothing, beta, temperature, tau, rho, rho
  --seeds="1 2 3"                  of the training, the flips and the minority; the choice uses the first
  --validation=0.3333              share of the training prompts that choose and are not trained on
  --prompts=144                    sample so many prompts of each split
  --best_of_n=4 --temperature=1.0 --max_new_tokens=32 --prompt_max_len=256
  --beta=0.1                       of all methods but DPO and IPO, which choose it
  --wdpo_prompt=once --wdpo_solver=exact   the paper's penalty, and the faster solver for sequences as short as these
  --learning_rate=1.5e-4 --train_batch_size=8 --micro_batch_size=8 --max_epochs=1 --max_len=512
  --keep_models=false              delete the checkpoints once their answers are scored
  --tiny=false                     a smaller version: three methods of one strength, one seed, 16 prompts of each split
  --jobs=1                         so many parts at a time, which share the cores
  --slurm=false                    one job a part (data, every choice, every run, report), each after those that it needs
  --sbatch="--gres=gpu:1 --cpus-per-task=8 --time=02:00:00"
USAGE
}

names=(output_path model_path reward_model dataset first second arms flipped minority methods seeds validation prompts best_of_n temperature
    max_new_tokens prompt_max_len beta wdpo_prompt wdpo_solver learning_rate train_batch_size micro_batch_size max_epochs max_len keep_models tiny jobs slurm sbatch)
output_path=outputs/preference_shift first=ultrafeedback_overall_score second=helpsteer_complexity arms="objectives noise populations"
flipped=0.25 minority=0.15 seeds="1 2 3" validation=0.3333 prompts=144 best_of_n=4 temperature=1.0 max_new_tokens=32 prompt_max_len=256 beta=0.1
wdpo_prompt=once wdpo_solver=exact
methods="DPO=0.05,0.2 cDPO=0.1,0.3 IPO=0.05,0.2 DrDPO=0.5,2 KLDPO=0.05,0.5 WDPO=0.002,0.01 WDPO-root=0.02,0.1"
learning_rate=1.5e-4 train_batch_size=8 micro_batch_size=8 max_epochs=1 max_len=512 keep_models=false tiny=false jobs=1 slurm=false
sbatch="--gres=gpu:1 --cpus-per-task=8 --time=02:00:00" part=""
# shellcheck source=experiments/parts.sh
source "$(dirname "$script")/parts.sh"
model_path="$ROOT/models/SmolLM2-135M" reward_model="$ROOT/models/ArmoRM-SmolLM2" dataset="$ROOT/datasets/embedded_prompts"

# strength_flags METHOD VALUE: sets `flags` for train_alignment.sh.
strength_flags() {
    local penalty=(--wdpo_prompt="$wdpo_prompt" --wdpo_solver="$wdpo_solver")
    case "$1" in
        DPO) flags=(--beta="$2") ;;
        cDPO) flags=(--beta="$beta" --label_smoothing="$2") ;;
        IPO) flags=(--beta="$2" --loss_type=ipo) ;;
        DrDPO) flags=(--beta="$beta" --drdpo_beta="$2") ;;
        KLDPO) flags=(--beta="$beta" --kldpo_tau="$2") ;;
        WDPO) flags=(--beta="$beta" --wdpo_rho="$2" "${penalty[@]}") ;;
        WDPO-root) flags=(--beta="$beta" --wdpo_rho="$2" "${penalty[@]}" --wdpo_penalty=root) ;;
        *) refuse_command "method $1: give of DPO cDPO IPO DrDPO KLDPO WDPO WDPO-root, each with its strengths, e.g. KLDPO=0.05,0.2" ;;
    esac
}

# strengths METHOD: those to choose from, separated by spaces.
strengths() {
    local word
    for word in $methods; do
        [[ "${word%%=*}" != "$1" ]] || tr , ' ' <<<"${word#*=}"
    done
}

list_parts() {
    local word value arm seed
    echo data
    for word in $methods; do
        for value in $(strengths "${word%%=*}"); do
            echo "choice/${word%%=*}/$value"
        done
    done
    for arm in $arms; do
        for word in $methods; do
            for seed in $seeds; do
                echo "$arm/${word%%=*}/$seed"
            done
        done
    done
    echo report
}

# needs PART: the parts before it, a line each.
# shellcheck disable=SC2329 # parts.sh calls it
needs() {
    case "$1" in
        data) ;;
        choice/*) echo data ;;
        report) list_parts | grep / | grep -v ^choice/ ;;
        *) list_parts | grep "^choice/$(cut -d/ -f2 <<<"$1")/" ;;
    esac
}

# shellcheck disable=SC2329 # run_experiment calls it
do_part() {
    local kind method value
    IFS=/ read -r kind method value <<<"$1"
    case "$kind" in
        data) make_data ;;
        choice) try_strength "$output_path/choice/${method}_$value" "$method" "$value" ;;
        report) make_report ;;
        *) align "$kind" "$method" "$value" ;;
    esac
}

make_data() {
    local data="$output_path/data" seed
    step bash "$ROOT/generate_completions.sh" --save_path="$output_path/base" --model_path="$model_path" --dataset="$dataset" \
        "${sampling[@]}"
    step python "$ROOT/experiments/shift_data.py" split "$output_path/base" "$data/completions" --share="$validation" --seed=0
    label "$data/both" "--$first=0.5" "--$second=0.5"
    label "$data/first" "--$first=1"
    label "$data/second" "--$second=1"
    shift_pairs flip "$data/both" "$data/objectives" --share=0 --seed=0
    for seed in $seeds; do
        shift_pairs flip "$data/both" "$data/noise_$seed" --share="$flipped" --seed="$seed"
        shift_pairs mix "$data/first" "$data/second" "$data/populations_$seed" --share="$minority" --seed="$seed"
    done
}

# shift_pairs WORD...: make the pairs of an arm. Few test pairs: the trainer's evaluation of them is for show here.
shift_pairs() {
    step python "$ROOT/experiments/shift_data.py" "$@" --test_pairs=16
}

# label FOLDER FLAG...: pairs by a mixture of objectives.
label() {
    step python "$ROOT/src/generate_preferences.py" --completions="$output_path/data/completions" --output_path="$1" "${@:2}"
}

# train FOLDER PAIRS METHOD VALUE SEED: a run that is finished is not repeated, though its checkpoint may be deleted.
train() {
    [[ ! -f "$1/finished" ]] || return 0
    local flags=()
    strength_flags "$3" "$4"
    step bash "$ROOT/train_alignment.sh" --model_path="$model_path" --dataset_path="$2" --save_path="$1" "${flags[@]}" \
        "${training[@]}" --seed="$5" ${further[@]+"${further[@]}"}
    : >"$1/finished"
}

# try_strength FOLDER METHOD VALUE: train as in the arm `objectives`, then answer the validation prompts.
try_strength() {
    if [[ ! -f "$1/validation/test.jsonl" ]]; then
        train "$1" "$output_path/data/objectives" "$2" "$3" "${seeds%% *}"
        answer "$1" validation "$output_path/data/completions/prompts"
    fi
    # Only the arm `objectives` makes a choice into a run.
    [[ "$keep_models" == true || " $arms " == *" objectives "* ]] || rm -rf "$1"/global_step_*
}

# answer FOLDER NAME PROMPTS: sample and score with the folder's checkpoint, into FOLDER/NAME.
answer() {
    local model
    model="$(checkpoint "$1/." last)"
    step bash "$ROOT/generate_completions.sh" --only_test=true --save_path="$1/$2" --model_path="$model" --dataset="$3" \
        "${sampling[@]}"
}

# align ARM METHOD SEED: train with the strength that was chosen, then sample and score the test prompts.
align() {
    local folder="$output_path/$1/$2_seed_$3"
    [[ -f "$folder/completions/test.jsonl" ]] || make_run "$@" "$folder"
    # Also after a kill between the two.
    if [[ "$keep_models" == false ]]; then
        rm -rf "$folder"/global_step_*
        # The choices of this method have been made into runs.
        [[ "$1/$3" != "objectives/${seeds%% *}" ]] || rm -rf "$output_path/choice/$2"_*/global_step_*
    fi
}

# make_run ARM METHOD SEED FOLDER
make_run() {
    local folder="$4" value pairs="$output_path/data/$1_$3"
    read -ra candidates < <(strengths "$2")
    value="$(python "$ROOT/experiments/shift_choice.py" "$output_path" "$2" "${candidates[@]}")"
    echo "$2: chosen strength $value"
    [[ "$1" != objectives ]] || pairs="$output_path/data/objectives"
    if [[ "$1/$3" == "objectives/${seeds%% *}" && ! -e "$folder" ]]; then
        # It is the run that was chosen.
        mkdir -p "$(dirname "$folder")"
        ln -s "../choice/$2_$value" "$folder"
    fi
    train "$folder" "$pairs" "$2" "$value" "$3"
    answer "$folder" completions "$dataset"
}

make_report() {
    local arm word seed runs
    for arm in $arms; do
        runs=("base=$output_path/base")
        for word in $methods; do
            for seed in $seeds; do
                runs+=("${word%%=*}=$output_path/$arm/${word%%=*}_seed_$seed/completions")
            done
        done
        run python "$ROOT/src/evaluate_armorm.py" --runs "${runs[@]}" --output_path="$output_path/$arm/report" \
            --trained_on "$first" "$second" --sweep "$first" "$second"
    done
    run python "$ROOT/experiments/shift_report.py" "$output_path"
}

parse_flags "$@"
[[ "$keep_models" == true || "$keep_models" == false ]] || refuse_command "--keep_models=$keep_models: give true or false"
[[ "$jobs" =~ ^[1-9][0-9]*$ ]] || refuse_command "--jobs=$jobs is not a number from 1"
if [[ "$tiny" == true ]]; then
    default output_path outputs/preference_shift_tiny
    default methods "DPO=0.1 KLDPO=0.2 WDPO=0.003"
    for pair in seeds=1 prompts=16 best_of_n=2 max_new_tokens=16 train_batch_size=4 micro_batch_size=2 max_epochs=1; do
        default "${pair%%=*}" "${pair#*=}"
    done
fi
# A wrong word ends here, before anything is made.
# once NAME WORD...: refuse a flag without words, and one word twice, whose parts would share a folder.
once() {
    (($# > 1)) || refuse_command "--$1 is empty"
    [[ -z "$(printf '%s\n' "${@:2}" | sort | uniq -d)" ]] || refuse_command "--$1: $(printf '%s\n' "${@:2}" | sort | uniq -d | head -n 1) is given twice"
}
read -ra words <<<"$arms" && once arms "${words[@]}"
read -ra words <<<"$seeds" && once seeds "${words[@]}"
read -ra words <<<"$methods" && once methods "${words[@]%%=*}"
[[ " ${words[*]%%=*} " == *" DPO "* ]] || refuse_command "--methods has no DPO, with which the others are compared; add e.g. DPO=0.1"
[[ "$first" != "$second" ]] || refuse_command "--first and --second are both $first; give two objectives"
for arm in $arms; do
    [[ " objectives noise populations " == *" $arm "* ]] || refuse_command "arm $arm: give of objectives noise populations"
done
for word in $methods; do
    [[ "$word" == *=?* ]] || refuse_command "method $word: give its strengths, e.g. KLDPO=0.05,0.2"
    strength_flags "${word%%=*}" 0
done
settle
training=(--learning_rate="$learning_rate" --train_batch_size="$train_batch_size" --micro_batch_size="$micro_batch_size"
    --max_epochs="$max_epochs" --max_len="$max_len" --eval_steps=0 --save_steps=0 --gradient_checkpointing=false --save_resume=false --log=none)
sampling=(--reward_model="$reward_model" --best_of_n="$best_of_n" --temperature="$temperature"
    --max_new_tokens="$max_new_tokens" --prompt_max_len="$prompt_max_len" ${prompts:+--max_prompts="$prompts"})
if [[ -z "$part" && "$slurm" == false && "$dataset" == "$ROOT/datasets/embedded_prompts" ]]; then
    bash "$ROOT/setup.sh" --models=embedded --datasets=embedded
    # The environment may be new.
    # shellcheck source=src/env.sh
    source "$ROOT/src/env.sh"
fi
run_experiment
