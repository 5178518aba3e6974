"""Pictures of a MuJoCo model by software rendering, cheap enough to record and to act by.

Shadows, reflections and multisampling are off, which makes a picture 13 times cheaper; it is drawn
at twice its size and averaged instead. Import this before mujoco, which reads MUJOCO_GL when it is
first imported.
"""

import os
from collections.abc import Collection, Iterable

# Mesa's renderer takes all cores unless told; one process per core is what we want.
os.environ.setdefault("MUJOCO_GL", "osmesa")
os.environ.setdefault("LP_NUM_THREADS", "0")

import numpy as np  # noqa: E402
from numpy import ndarray  # noqa: E402


class Eye:
    """A renderer of pictures (height, width, 3). It belongs to the process that makes it. Cameras
    that are `turned` hang upside down: their pictures are set upright."""

    def __init__(self, model: object, height: int, width: int, turned: Collection[str] = ()):
        import mujoco

        self.model = model
        self.aspect = width / height
        self.turned = turned
        model.vis.quality.offsamples = 0
        model.vis.global_.offheight = max(480, 2 * height)
        model.vis.global_.offwidth = max(640, 2 * width)
        self.renderer = mujoco.Renderer(model, 2 * height, 2 * width)
        self.option = mujoco.MjvOption()
        flags = mujoco.mjtRndFlag
        for effect in (flags.mjRND_SHADOW, flags.mjRND_REFLECTION):
            self.renderer.scene.flags[effect] = 0

    def picture(self, data: object, camera: str) -> ndarray:
        """The picture of a camera of the model, (height, width, 3) uint8."""
        self.renderer.update_scene(data, camera=camera, scene_option=self.option)
        twice = self.renderer.render().astype(np.uint16)
        rows = twice[::2] + twice[1::2]
        sums = rows[:, ::2] + rows[:, 1::2]
        picture = ((sums + 2) // 4).astype(np.uint8)
        if camera in self.turned:
            picture = np.rot90(picture, 2).copy()
        return picture

    def places(self, data: object, camera: str, points: Iterable[ndarray]) -> ndarray:
        """Where n points (3,) of the world are in a camera's picture: (n, 2), 0 to 1 from left and
        top, at most one side outside."""
        here = data.camera(camera)
        away = np.stack(list(points)) - here.xpos
        right, up, towards = here.xmat.reshape(3, 3).T @ away.T
        angle = np.radians(self.model.camera(camera).fovy[0])
        depth = np.maximum(-towards, 1e-3)
        height = 2 * depth * np.tan(angle / 2)  # of what the picture shows at that depth
        x = 0.5 + right / height / self.aspect
        y = 0.5 - up / height
        place = np.column_stack([x, y]).clip(-1, 2)
        if camera in self.turned:
            place = 1 - place
        return place

    def __del__(self):
        # MuJoCo deletes an old renderer's textures in whatever context is current: in that of
        # another renderer, unless its own is.
        if renderer := getattr(self, "renderer", None):
            renderer._gl_context.make_current()
            renderer.close()
