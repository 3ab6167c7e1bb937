#!/usr/bin/env bash
# A Slurm of one node on this machine, for tests. Needs root and Debian; everything that it writes is in FOLDER.
#     tests/slurm_cluster.sh start FOLDER    # installs slurm-wlm and munge if they are missing
#     SLURM_CONF=FOLDER/slurm.conf squeue
#     tests/slurm_cluster.sh stop FOLDER
# CPUS (4) and MAX_ARRAY_SIZE (1001, Slurm's default) come from the environment; CPUS may be more than there are.
# Exit code 77: Slurm cannot be had on this machine, and why.
set -euo pipefail

install() {
    if [ "$(id -u)" -ne 0 ]; then
        echo "Slurm's daemons and their installation need root"
        return 77
    fi
    type slurmctld slurmd sbatch munged >/dev/null 2>&1 && return
    export DEBIAN_FRONTEND=noninteractive
    if ! { apt-get update && apt-get install --yes --no-install-recommends slurm-wlm munge; } >"$folder/apt.log" 2>&1; then
        echo "slurm-wlm and munge cannot be installed: $(tail -n 1 "$folder/apt.log")"
        return 77
    fi
}

start() {
    mkdir -p "$folder"/{munge,state,spool}
    install
    local host ports
    host=$(hostname -s)
    ports=($(python3 -c 'import socket
both = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
print(*(server.getsockname()[1] for server in both))'))
    cat >"$folder/slurm.conf" <<EOC
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmdPort=${ports[1]}
SlurmUser=root
AuthType=auth/munge
# a requeued job waits until its credential has expired, which takes 120 s unless set
AuthInfo=socket=$folder/munge/socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SchedulerParameters=sched_interval=2
MaxArraySize=${MAX_ARRAY_SIZE:-1001}
SlurmdParameters=config_overrides
NodeName=$host NodeAddr=127.0.0.1 CPUs=${CPUS:-4}
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE
EOC
    head -c 128 /dev/urandom >"$folder/munge/key"
    chmod 755 "$folder"
    chmod 700 "$folder/munge" && chmod 600 "$folder/munge/key" && chown -R munge: "$folder/munge"
    chmod 711 "$folder/munge" # for those who use the socket
    runuser -u munge -- munged --socket "$folder/munge/socket" --key-file "$folder/munge/key" \
        --pid-file "$folder/munge/pid" --log-file "$folder/munge/log" --seed-file "$folder/munge/seed"
    export SLURM_CONF="$folder/slurm.conf"
    slurmctld
    slurmd
    for _ in {1..60}; do
        [ "$(sinfo --noheader --format=%T 2>/dev/null)" = idle ] && return
        sleep 0.5
    done
    tail -n 20 "$folder/slurmctld.log" "$folder/slurmd.log"
    echo "Slurm did not start"
    return 1
}

stop() {
    export SLURM_CONF="$folder/slurm.conf"
    local pids pid
    scancel --quiet --user=root || true
    for _ in {1..80}; do # Slurm kills 30 s after it has asked to end
        [ -z "$(squeue --noheader 2>/dev/null)" ] && break
        sleep 0.5
    done
    pids=$(cat "$folder"/{slurmd.pid,slurmctld.pid,munge/pid} 2>/dev/null) || true
    for pid in $pids; do
        kill "$pid" || true
    done
    for pid in $pids; do
        timeout 20 tail --pid="$pid" -f /dev/null || kill -KILL "$pid"
    done
}

folder=$(realpath -m "$2")
"$1"
