# What follows is the same for every job. It runs on the first node, outside of any container.
#
#   start -> check the nodes -> start the processes on them -> wait -> done, or back into the queue
#
# Ahead of the time limit Slurm sends $signal to this shell alone, which passes it on to the processes. In a
# preemption Slurm sends TERM to the processes alone. Either way they save, leave a file `stopped` in the run's
# folder, and end; this shell then requeues the job, unless the user cancelled it.

set -u
run=${runs[${SLURM_ARRAY_TASK_ID:-0}]}
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
start=${SLURM_RESTART_COUNT:-0}
events=$run/jobs.tsv
stopping='' cancelled='' code=0
trap 'stopping=yes; say "asked to stop ahead of the time limit"' "$signal"
trap 'cancelled=yes' TERM

say() { printf '%s job %s, start %s: %s\n' "$(date '+%F %T')" "$job" "$start" "$*"; }

# time, job, start, what happened, and more of it
note() { printf '%s\t%s\t%s\t%s\t%s\n' "$(date +%s)" "$job" "$start" "$1" "$2" >>"$events"; }

finish() { # finish EVENT EXIT_CODE REASON
  note "$1" "$3"
  say "$3"
  exit "$2"
}

newest_step() { # of the checkpoints; 0 where there are none
  local path newest=0
  for path in "$run"/checkpoints/step-*/manifest.json; do
    path=${path%/manifest.json}
    path=${path##*/step-}
    case $path in *[!0-9]*) continue ;; esac
    [ "$((10#$path))" -le "$newest" ] || newest=$((10#$path))
  done
  echo "$newest"
}

begin() { # stop a job that starts again and again from the same step
  local step tries
  step=$(newest_step)
  note start "$step"
  say "on $SLURM_JOB_NODELIST, from step $step"
  tries=$(awk -F'\t' -v job="$job" \
    '$2 == job && $4 == "start" { n = $5 == step ? n + 1 : 1; step = $5 } END { print n }' "$events")
  [ "$tries" -gt $((restarts_without_progress + 1)) ] || return 0
  {
    echo "Started $tries times from step $step without getting to another checkpoint:"
    awk -F'\t' -v job="$job" '$2 == job { print strftime("  %F %T", $1) "  start " $3 "  " $4 " " $5 }' "$events" |
      tail -n 20
    echo "The end of logs/rank-00000.log:"
    tail -n 20 "$run/logs/rank-00000.log"
  } >"$run/gave_up.txt" 2>&1
  cat "$run/gave_up.txt"
  finish gave_up 1 "gave up after $tries starts from step $step: see $run/gave_up.txt"
}

state() { squeue -h -j "$job" -o %T 2>/dev/null; }

again() { # again REASON [BAD_NODES]: back into the queue, from which a job that was cancelled doesn't come back
  local now
  now=$(state)
  if [ "$(scontrol show job "$job" | sed -n 's/.* Restarts=\([0-9]*\).*/\1/p')" != "$start" ]; then
    note requeue "by Slurm, since a node failed"
    exit 0
  fi
  [ -z "$cancelled" ] && [ "$now" = RUNNING ] || finish cancelled 0 "not requeued: $now"
  [ "$requeue" = yes ] || finish stopped 75 "$1; slurm.requeue is off"
  trap '' TERM "$signal" # requeueing ends this shell, which has a last thing to do
  note requeue "$1"
  say "requeued: $1"
  scontrol requeue "$job" || finish failed 1 "can't be requeued"
  [ -z "${2:-}" ] || leave_out "$2"
  exit 0
}

leave_out() { # nodes that the job shall not start on; Slurm takes it of a job that waits
  local out
  out=$(scontrol show job "$job" | sed -n 's/.*ExcNodeList=\([^ ]*\).*/\1/p' | grep -v '^(null)$')
  scontrol update "JobId=$job" "ExcNodeList=${out:+$out,}$1" || say "can't leave out $1"
}

own_address() { # of the node that this runs on, as the others reach it
  local each
  if [ -n "$interface" ]; then
    ip -4 -o addr show dev "$interface" | sed -n 's/.* inet \([0-9.]*\).*/\1/p' | head -n 1
  elif [ "$address" = hostname ]; then
    hostname
  else
    for each in $node_addresses; do
      [ "${each%%=*}" != "$SLURMD_NODENAME" ] || echo "${each#*=}"
    done
  fi
}

check_nodes() { # check_nodes alone|together: each writes `ok ...`, or what is wrong with it, into a file of its name
  local node bad='' good='' folder=$run/health/$job.$start/$1
  rm -rf "$folder"
  mkdir -p "$folder"
  timeout --kill-after=10 "$health_seconds" srun "${srun_options[@]}" --ntasks="$SLURM_JOB_NUM_NODES" \
    --ntasks-per-node=1 --kill-on-bad-exit=0 "${inside[@]}" bash -c 'RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS MASTER_PORT=$((MASTER_PORT + 6000)) exec "$@"' \
    bash "$python" "${check[@]}" "$run/$config" "$1" "$folder"
  code=$?
  for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
    [ -e "$folder/$node" ] || echo 'did not answer' >"$folder/$node"
    say "$node: $(cat "$folder/$node")"
    case $(cat "$folder/$node") in ok*) good=yes ;; *) bad=${bad:+$bad,}$node ;; esac
  done
  [ -z "$stopping$cancelled" ] && [ "$(state)" = RUNNING ] || again "stopped before it began"
  [ -z "$bad" ] && [ $code != 0 ] && [ "$1" = together ] && again "the nodes don't reach each other"
  [ -n "$bad" ] || return 0
  [ -n "$good" ] || finish failed 1 "no node is healthy: $bad"
  again "left out $bad" "$bad"
}

launch() { # start the processes, which ignore signals until they can act on them, and wait; $code is how they ended
  rm -f "$run/stopped"
  if [ "$launcher" = torchrun ]; then
    srun "${srun_options[@]}" --ntasks-per-node=1 --cpus-per-task="$cpus" --kill-on-bad-exit=1 "${inside[@]}" \
      bash -c 'trap "" TERM INT USR1 USR2; exec "$0" -m torch.distributed.run --local-addr="$(own_address)" "$@"' \
      "$python" "${torchrun_options[@]}" --nnodes="$SLURM_JOB_NUM_NODES" --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" \
      --rdzv-id="$job.$start" "${train[@]}" "$run/$config" &
  else
    srun "${srun_options[@]}" --ntasks-per-node="$processes" --cpus-per-task="$cpus" --kill-on-bad-exit=1 \
      "${inside[@]}" bash -c 'trap "" TERM INT USR1 USR2; export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
        export WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES)); exec "$@"' \
      bash "$python" "${train[@]}" "$run/$config" &
  fi
  local step=$!
  while kill -0 $step 2>/dev/null; do # a signal ends `wait` early
    if [ -n "$stopping" ]; then # again and again: processes that are starting miss it
      scancel --signal="$signal" "$job" 2>/dev/null
      sleep 5 &
      wait -n $step $!
    else
      wait $step
    fi
  done
  wait $step
  code=$?
}

preempted() { scontrol show job "$job" | grep -q 'PreemptTime=[0-9]'; }

begin
node_addresses=$(scontrol show node -o "$SLURM_JOB_NODELIST" |
  sed -n 's/NodeName=\([^ ]*\) .*NodeAddr=\([^ ]*\).*/\1=\2/p')
export interface address node_addresses
export -f own_address
MASTER_ADDR=$(own_address)
MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7 + start) % 6000))
export MASTER_ADDR MASTER_PORT
[ "$health" = no ] || check_nodes alone
[ "$health" != together ] || [ "$SLURM_JOB_NUM_NODES" = 1 ] || check_nodes together
left=$max_restarts
while :; do
  launch
  # torchrun starts failed processes again by itself; a user's mistake (2) would be made again
  if [ "$launcher" = torchrun ] || [ $code = 0 ] || [ $code = 2 ] || [ -e "$run/stopped" ]; then break; fi
  if [ -n "$stopping$cancelled" ] || [ "$left" = 0 ] || preempted || [ "$(state)" != RUNNING ]; then break; fi
  left=$((left - 1))
  note restart "the processes failed with code $code"
done
if [ -e "$run/stopped" ]; then
  again "$(cat "$run/stopped")"
elif [ $code = 0 ]; then
  finish done 0 "done"
elif [ $code = 2 ]; then
  finish failed 2 "failed, and would again: see the log above"
elif [ -n "$stopping" ] || preempted; then
  again "stopped before it could save (code $code)"
else
  again "failed with code $code"
fi
