#!/usr/bin/env bash
# A real Slurm on this machine for tests, as root: munge, slurmctld and two nodes n1, n2; with slurmdbd and MariaDB if
# there shall be accounting.
#
#   scripts/slurm_cluster.sh start [--accounting]
#   scripts/slurm_cluster.sh stop
#
# It writes /etc/slurm/*.conf (or beside $SLURM_CONF), and refuses a machine that has a Slurm or a MariaDB of its own.
# Partitions: `batch` (default) and `low`, whose jobs `batch` preempts and requeues.
set -euo pipefail

folder=${SLURM_TEST_DIR:-$(cd "$(dirname "$0")/.." && pwd)/.cache/slurm}
host=$(hostname -s)
export SLURM_CONF=${SLURM_CONF:-/etc/slurm/slurm.conf}
etc=$(dirname "$SLURM_CONF")

refuse() {
    echo "$1: not this test cluster's. Use another machine, or a container." >&2
    exit 1
}

require_own() {
    [ ! -e "$SLURM_CONF" ] || { grep -q '^ClusterName=test$' "$SLURM_CONF" &&
        grep -q '^NodeName=n1 .*Port=17001 ' "$SLURM_CONF"; } || refuse "$SLURM_CONF"
    [ ! -e "$etc/slurmdbd.conf" ] || grep -q '^StoragePass=x$' "$etc/slurmdbd.conf" || refuse "$etc/slurmdbd.conf"
}

stop() {
    require_own
    [ ! -e "$SLURM_CONF" ] || scancel --user=root 2>/dev/null || true
    sleep 2
    for file in "$folder"/*.pid; do  # no other daemon of this machine
        [ -e "$file" ] || continue
        pid=$(cat "$file")
        kill "$pid" 2>/dev/null || true
        timeout 30 tail --pid="$pid" -f /dev/null || true  # its port is free for the next start
    done
    [ ! -e "$folder/mariadb.started" ] || mariadb-admin shutdown || true
    sleep 2
    rm -rf "$folder"
}

wait_for() {
    for _ in $(seq 100); do "$@" >/dev/null 2>&1 && return; sleep 0.2; done
    echo "no answer: $*" >&2
    exit 1
}

install() {
    require_own
    if [ "$accounting" ] && [ ! -e "$folder/mariadb.started" ] && mariadb -e "select 1" >/dev/null 2>&1; then
        refuse "a MariaDB that runs here"
    fi
    local packages=(munge slurmctld slurmd slurm-client)
    [ "$accounting" ] && packages+=(slurmdbd mariadb-server)
    dpkg -s "${packages[@]}" >/dev/null 2>&1 ||
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
}

start_accounting() {
    mkdir -p /run/mysqld && chown mysql:mysql /run/mysqld
    mariadbd-safe --user=mysql --skip-networking=0 --bind-address=127.0.0.1 >"$folder/log/mariadb" 2>&1 &
    wait_for mariadb -e "select 1"
    touch "$folder/mariadb.started"
    mariadb -e "create database if not exists slurm_acct_db"
    for at in localhost 127.0.0.1; do
        mariadb -e "create user if not exists 'slurm'@'$at' identified by 'x'; grant all on slurm_acct_db.* to 'slurm'@'$at'"
    done
    cat >"$etc/slurmdbd.conf" <<C
AuthType=auth/munge
DbdHost=localhost
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StorageUser=slurm
StoragePass=x
LogFile=$folder/log/slurmdbd
PidFile=$folder/slurmdbd.pid
C
    chmod 600 "$etc/slurmdbd.conf"
    slurmdbd
    wait_for sacctmgr -n show cluster
    sacctmgr -i add cluster test >/dev/null || true  # they are there after an earlier start
    sacctmgr -i add account root description=tests organization=tests >/dev/null || true
    sacctmgr -i add user root account=root >/dev/null || true
}

start() {
    install
    mkdir -p /run/munge /var/log/munge /var/lib/munge /etc/munge "$etc" "$folder"/{log,state,spool}
    [ -f /etc/munge/munge.key ] || /usr/sbin/mungekey -c
    chown -R munge:munge /run/munge /var/log/munge /var/lib/munge /etc/munge
    if ! munge --no-input >/dev/null 2>&1; then
        su -s /bin/sh munge -c "/usr/sbin/munged --force"
        wait_for munge --no-input
        cp /run/munge/munged.pid "$folder/munged.pid"  # so that it is ended, as no other is
    fi
    grep -q ' n1 n2$' /etc/hosts || echo "127.0.0.1 n1 n2" >>/etc/hosts
    cat >"$SLURM_CONF" <<C
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.%n.pid
SlurmctldLogFile=$folder/log/slurmctld
SlurmdLogFile=$folder/log/slurmd.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
JobAcctGatherType=jobacct_gather/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=30
MinJobAge=300
SlurmdTimeout=20
SchedulerParameters=bf_interval=5
${accounting:+AccountingStorageType=accounting_storage/slurmdbd}
${accounting:+AccountingStorageHost=localhost}
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=17001 CPUs=2 RealMemory=8000
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=17002 CPUs=2 RealMemory=8000
PartitionName=batch Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
C
    [ -z "$accounting" ] || start_accounting
    slurmctld
    wait_for sinfo
    slurmd -N n1
    slurmd -N n2
    wait_for srun --nodes=2 true
    sinfo
}

accounting=$([ "${2:-}" = --accounting ] && echo yes || true)
case ${1:-} in
    start) start ;;
    stop) stop ;;
    *) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
