"""Room that dead actors left reserved: without it a training that is started again would wait for itself."""

import time

INTERVAL = 0.2


def release_groups(patience: float = 0.0) -> int:
    """Removes this job's placement groups whose actor is dead; with `patience` waits until there is one.

    Ray keeps them as long as the job. Ray Train's own cleaner learns of a group only once it has started, and asks the
    dashboard, which need not run.

    Args:
        patience: seconds.

    Returns:
        how many were removed.
    """
    from ray import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    until = time.monotonic() + patience
    while not (found := _left()) and time.monotonic() < until:
        time.sleep(INTERVAL)
    for group in found:
        remove_placement_group(PlacementGroup(PlacementGroupID(group)))
    return len(found)


def _left() -> list[bytes]:
    import ray
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData

    job = ray.get_runtime_context().get_job_id()
    accessor = ray._private.state.state._connect_and_get_accessor()
    groups = map(PlacementGroupTableData.FromString, accessor.get_placement_group_table())
    return [
        group.placement_group_id
        for group in groups
        if group.creator_job_id.hex() == job
        and not ray.ActorID(group.creator_actor_id).is_nil()  # the driver's
        and group.creator_actor_dead
        and not group.is_detached
        and group.state != PlacementGroupTableData.REMOVED
    ]
