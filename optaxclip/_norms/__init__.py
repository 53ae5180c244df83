"""Norms: from a tree of gradients to a tree of norms."""

from optaxclip._norms import unit_axes as unit_axes
from optaxclip._norms.euclidean import RARE as RARE
from optaxclip._norms.gradients import accumulator as accumulator
from optaxclip._norms.gradients import is_gradient as is_gradient
from optaxclip._norms.gradients import path_name as path_name
from optaxclip._norms.gradients import scaled as scaled
from optaxclip._norms.gradients import split as split
from optaxclip._norms.gradients import unwrapped as unwrapped
from optaxclip._norms.gradients import widen as widen
from optaxclip._norms.maximum import largest as largest
from optaxclip._norms.shares import AxisName as AxisName
from optaxclip._norms.shares import depth_of_caller as depth_of_caller
from optaxclip._norms.shares import initialising as initialising
from optaxclip._norms.shares import same_on_all_devices as same_on_all_devices
from optaxclip._norms.shares import taken_as_whole as taken_as_whole
from optaxclip._norms.shares import varying_axes as varying_axes
from optaxclip._norms.shares import warned as warned
from optaxclip._norms.tree import along as along
from optaxclip._norms.tree import global_norm as global_norm
from optaxclip._norms.tree import leaf_norm as leaf_norm
from optaxclip._norms.tree import leaf_rms as leaf_rms
from optaxclip._norms.tree import unit_norm as unit_norm
