"""Things of the standard library and of our libraries that a `_target_` could name."""

TARGETS = """
distutils.spawn.spawn os.system os.popen os.mkdir os.makedirs os.open os.mkfifo os.mknod os.symlink os.link
os.rename os.remove os.removedirs os.execv os.posix_spawn os.spawnl os.putenv os.chmod posix.system posix.mkdir
nt.system subprocess.run subprocess.Popen subprocess.call subprocess.check_call subprocess.check_output
subprocess.getoutput builtins.open builtins.eval builtins.exec builtins.compile builtins.__import__
builtins.breakpoint io.open io.FileIO pathlib.Path.write_text pathlib.Path.touch pathlib.Path.mkdir
pathlib.Path.unlink pathlib.Path.symlink_to shutil.copyfile shutil.rmtree shutil.move shutil.copytree
shutil.make_archive shutil.unpack_archive tempfile.mkstemp tempfile.mkdtemp site.addsitedir site.main
runpy.run_path runpy.run_module code.interact importlib.import_module importlib.reload pickle.load pickle.loads
marshal.loads shelve.open dbm.open sqlite3.connect logging.FileHandler logging.config.dictConfig logging.os.system
ctypes.CDLL webbrowser.open pty.spawn cProfile.run urllib.request.urlretrieve urllib.request.urlopen
socket.create_connection asyncio.run multiprocessing.Process torch.load torch.hub.load
transformers.AutoModel.from_pretrained hydra.utils.instantiate
""".split()
