"""Environments as schedulers, launchers and clouds leave them; variables of no interest here left out.

Those of SLURM (22.05), Open MPI (4.1) and MPICH were recorded here; the others are written from their documentation.
"""

from __future__ import annotations

RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# srun -N2 -n4 --ntasks-per-node=2, its last task
SLURM_TASK_PER_PROCESS = {
    "SLURMD_NODENAME": "node2", "SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "bash", "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_JOB_NUM_NODES": "2", "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1", "SLURM_LOCALID": "1", "SLURM_NNODES": "2",
    "SLURM_NODEID": "1", "SLURM_NODELIST": "node[1-2]", "SLURM_NPROCS": "4", "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": "3", "SLURM_STEPID": "1", "SLURM_STEP_ID": "1",
    "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_TASKS_PER_NODE": "2(x2)",
}  # fmt: skip
# srun -N2 inside sbatch, its second task
SLURM_TASK_PER_NODE = {
    "ENVIRONMENT": "BATCH", "SLURMD_NODENAME": "node2", "SLURM_JOB_ID": "4", "SLURM_JOB_NAME": "job",
    "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_LOCALID": "0", "SLURM_NNODES": "2",
    "SLURM_NODEID": "1", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_PROCID": "1", "SLURM_STEPID": "0",
    "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_TASKS_PER_NODE": "1(x2)",
}  # fmt: skip
SLURM_REQUEUED = {**SLURM_TASK_PER_NODE, "SLURM_RESTART_COUNT": "1"}
# the batch script itself
SLURM_BATCH = {
    "ENVIRONMENT": "BATCH", "SLURMD_NODENAME": "node1", "SLURM_JOB_ID": "4", "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_JOB_NUM_NODES": "2", "SLURM_LOCALID": "0", "SLURM_NNODES": "2", "SLURM_NODEID": "0", "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0", "SLURM_TASKS_PER_NODE": "1(x2)",
}  # fmt: skip
# salloc -N2 -n4
SLURM_SHELL = {
    "SLURM_JOB_ID": "5", "SLURM_JOB_NAME": "interactive", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NNODES": "2", "SLURM_NTASKS": "4", "SLURM_TASKS_PER_NODE": "3,1",
}  # fmt: skip
# srun -N2 -n4 --pty bash
SLURM_PTY_SHELL = {
    **SLURM_SHELL, "SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
    "SLURM_PTY_PORT": "34861", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "3,1",
}  # fmt: skip
# srun -n4 from that shell, its last task: the variable of the terminal is inherited
SLURM_FROM_PTY_SHELL = {
    **SLURM_PTY_SHELL, "SLURM_STEP_ID": "3", "SLURM_PROCID": "3", "SLURM_NODEID": "1", "SLURM_LOCALID": "0",
}  # fmt: skip
# salloc where LaunchParameters=use_interactive_step
SLURM_INTERACTIVE_STEP = {**SLURM_PTY_SHELL, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "4"}
# srun -n1 --pty bash
SLURM_PTY_OF_ONE = {
    **SLURM_PTY_SHELL, "SLURM_JOB_NUM_NODES": "1", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1",
}  # fmt: skip

OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_NODE_RANK": "1", "OMPI_UNIVERSE_SIZE": "2",
    "PMIX_RANK": "1", "PMIX_NAMESPACE": "817692673",
}  # fmt: skip
OPENMPI_TWO_NODES = {
    "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_ADDR": "node-a", "MASTER_PORT": "29600",
}  # fmt: skip
OPENMPI_TASK_PER_NODE = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1", "MASTER_ADDR": "node-a",
}  # fmt: skip
MPICH = {"PMI_FD": "8", "PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "1"}
# srun --mpi=pmi2, one task on each node
SLURM_PMI2 = {**SLURM_TASK_PER_NODE, "PMI_RANK": "1", "PMI_SIZE": "2"}
# mpirun of MPICH inside a SLURM job: its proxies are a step of one task per node
MPICH_IN_SLURM = {
    **SLURM_TASK_PER_NODE, "PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "1",
    "MASTER_ADDR": "node1",
}  # fmt: skip
PALS = {
    "PALS_RANKID": "5", "PALS_LOCAL_RANKID": "1", "PALS_LOCAL_SIZE": "4", "PALS_NODEID": "1", "PMI_RANK": "5",
    "PMI_SIZE": "8", "MASTER_ADDR": "nid001",
}  # fmt: skip
JSRUN = {
    "JSM_NAMESPACE_RANK": "2", "JSM_NAMESPACE_SIZE": "4", "JSM_NAMESPACE_LOCAL_RANK": "0",
    "JSM_NAMESPACE_LOCAL_SIZE": "2", "LSB_JOBID": "77", "MASTER_ADDR": "a01",
}  # fmt: skip
FLUX = {
    "FLUX_TASK_RANK": "3", "FLUX_TASK_LOCAL_ID": "1", "FLUX_JOB_SIZE": "4", "FLUX_JOB_NNODES": "2",
    "FLUX_JOB_ID": "ƒKPQd", "MASTER_ADDR": "corona1",
}  # fmt: skip

KUBEFLOW = {
    "PET_NNODES": "2", "PET_NPROC_PER_NODE": "4", "PET_NODE_RANK": "1", "PET_MASTER_PORT": "29400",
    "PET_MASTER_ADDR": "train-node-0-0.train", "KUBERNETES_SERVICE_HOST": "10.96.0.1",
}  # fmt: skip
KUBEFLOW_AUTO = {**KUBEFLOW, "PET_NPROC_PER_NODE": "auto"}
KUBEFLOW_ELASTIC = {
    "PET_NNODES": "1:4", "PET_NPROC_PER_NODE": "2", "PET_RDZV_BACKEND": "c10d", "PET_MAX_RESTARTS": "10",
    "PET_RDZV_ENDPOINT": "elastic-worker-0:23456", "PET_RDZV_ID": "job-1",
}  # fmt: skip
PYTORCHJOB = {
    "RANK": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456", "PYTHONUNBUFFERED": "1",
    "KUBERNETES_SERVICE_HOST": "10.96.0.1",
}  # fmt: skip
SKYPILOT = {
    "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.7", "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NUM_GPUS_PER_NODE": "8",
}  # fmt: skip
DSTACK = {
    "DSTACK_NODES_NUM": "2", "DSTACK_NODE_RANK": "1", "DSTACK_MASTER_NODE_IP": "10.128.0.47",
    "DSTACK_GPUS_PER_NODE": "8", "DSTACK_GPUS_NUM": "16", "DSTACK_NODES_IPS": "10.128.0.47\n10.128.0.48",
}  # fmt: skip
SAGEMAKER = {
    "SM_HOSTS": '["algo-1","algo-2"]', "SM_CURRENT_HOST": "algo-2", "SM_NUM_GPUS": "8",
    "SM_NETWORK_INTERFACE_NAME": "eth0",
}  # fmt: skip
LEPTON = {
    "LEPTON_JOB_TOTAL_WORKERS": "2", "LEPTON_JOB_WORKER_INDEX": "1", "LEPTON_JOB_WORKER_PREFIX": "train",
    "LEPTON_SUBDOMAIN": "train-svc",
}  # fmt: skip
VERTEX_SPEC = (
    '{"cluster": {"workerpool0": ["cmle-workerpool0-0:2222"], "workerpool1": ["cmle-workerpool1-0:2222",'
    ' "cmle-workerpool1-1:2222"]}, "environment": "cloud", "task": {"type": "workerpool1", "index": 1}}'
)
VERTEX = {"CLUSTER_SPEC": VERTEX_SPEC}
VERTEX_PYTORCH = {
    **VERTEX, "RANK": "2", "WORLD_SIZE": "3", "MASTER_ADDR": "cmle-workerpool0-0", "MASTER_PORT": "2222",
}  # fmt: skip
AZUREML_PROCESS = {
    "AZUREML_RUN_ID": "run", "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "NODE_RANK": "1",
    "MASTER_ADDR": "10.0.0.4", "MASTER_PORT": "6105",
}  # fmt: skip
AZUREML_NODE = {
    "AZUREML_RUN_ID": "run", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "NODE_RANK": "1", "NODE_COUNT": "2",
    "MASTER_ADDR": "10.0.0.4", "MASTER_PORT": "6105",
}  # fmt: skip
TORCHRUN_WORKER = {
    "TORCHELASTIC_RUN_ID": "none", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511",
}  # fmt: skip
